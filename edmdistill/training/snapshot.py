"""What a run shows and hands over on its way: pictures at fixed seeds, and the product's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.posthoc_ema import Profile, save_snapshot
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.sampling.generate import is_latent, sample
from edmdistill.sampling.grid import image_grid, named_rows, to_uint8
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.training.ema import PowerFunction
from edmdistill.training.monitors import require_finite
from edmdistill.training.run import Run
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

COLUMNS, ROWS = 10, 2
"""Pictures for each number of steps."""
LEVELS = 0.3, 2.5, 20.0
"""Noise levels at which the networks of a run are compared."""


def picture_path(folder: Path, images: int) -> Path:
    """Returns where the picture after so many images is."""
    return folder / f"{images:09d}.png"


def draw(run: Run, folder: Path) -> None:
    """folder/IMAGES.png: two rows for each NFE of the recipe, by the average; always the same seeds, classes in turn.

    Latents are not drawn.
    """
    network, own = run.ema.network, run.recipe.sampling
    model = Denoiser(network) if run.config.stage == "teacher" else Generator(network, run.config)
    if is_latent(model):
        return
    seeds = range(COLUMNS * ROWS)
    labels = [seed % network.label_dim for seed in seeds] if network.label_dim else None
    images = torch.cat([sample(model, nfe, seeds=seeds, labels=labels) for nfe in own.nfe])
    if not run.engine.is_main:
        return
    with atomic_write(picture_path(folder, run.images)) as new:
        image_grid(to_uint8(images), COLUMNS).save(new, "png")


@torch.no_grad()
def compare(run: Run, folder: Path) -> None:
    """folder/IMAGES.png: what each role makes of the same noisy data, a row for each role at each noise level.

    Where a role reads a second time, the product is asked for the data, at 0, and others are given the largest. One
    that reads a weight of guidance is given the least. The networks are those in training: of averages, there are the
    grids of samples. Latents are not drawn.
    """
    network = run.ema.network
    if is_latent(Denoiser(network)):
        return
    x0, labels, _ = run.stream().read(0, COLUMNS)
    z = SeededNoise(range(COLUMNS)).normal(x0.shape[1:]).to(x0) * network.sigma_data
    last = sigma_to_time(network.sigma_max, network.sigma_data).to(x0.device)
    own = {role: run.roles[role] for role, part in run.recipe.roles.items() if part.ema_of is None}
    rows = []
    for sigma in LEVELS:
        t = sigma_to_time(sigma, network.sigma_data).to(x0.device)
        x_t = diffuse(x0, z, t)
        rows.append((f"data at sigma {sigma:g}", x_t))
        for role, module in own.items():
            if isinstance(module, FlowNetwork):
                second = torch.zeros_like(last) if role == run.method.product else last
                w = torch.tensor(run.recipe.guidance[0]) if module.guided else None
                F = module.eval()(x_t, t, labels, second if module.two_time else None, w=w)
                rows.append((role, denoised(x_t, F, t, module.sigma_data)))
    if run.engine.is_main:
        with atomic_write(picture_path(folder, run.images)) as new:
            named_rows([(name, to_uint8(images)) for name, images in rows]).save(new, "png")


def publish(run: Run, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """The average as a checkpoint ready for use, in place of the one before.  weights: of the average, whole."""
    config = replace(run.config, images_seen=run.images, ema=run.ema.profile.describe())
    save_checkpoint(folder, run.ema.network, config, overwrite=True, tensors=weights)


def keep_averages(run: Run, folder: Path) -> None:
    """The power-function averages, for others to be made of them.

    All processes call it together.
    Raises: Diverged: a weight is NaN or infinite.  CheckpointError: the disk refuses.
    """
    require_finite(run.roles, run.images, run.engine.any_process)
    for average in run.averages:
        if isinstance(average.profile, PowerFunction):
            network, profile = average.network.network, Profile(run.images, average.profile.sigma_rel)
            weights, constants = run.engine.full_state(network), {name for name, _ in network.named_buffers()}
            run.engine.on_main(partial(save_snapshot, folder, profile, weights, constants))
