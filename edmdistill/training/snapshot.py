"""Snapshots of a run: image grids at fixed seeds, the product's checkpoint, and averages for post-hoc EMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from edmdistill.sampling.generate import is_latent, not_finite, sample
from edmdistill.sampling.grid import image_grid, named_rows, to_uint8
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.training.ema import PowerFunction
from edmdistill.training.monitors import require_finite
from edmdistill.training.run import Run
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

COLUMNS, ROWS = 10, 2
"""Images of a grid for each number of steps."""
GRID_SIGMAS = 0.3, 2.5, 20.0
"""Noise levels at which the networks of a run are compared."""
WHITE = 1.0


def grid_path(folder: Path, images: int) -> Path:
    """Returns the path of the grid after so many images."""
    return folder / f"{images:09d}.png"


def save_sample_grid(run: Run, folder: Path, tell: Callable[[str], object]) -> None:
    """Draws folder/IMAGES.png: samples of the average, two rows for each NFE of the recipe.

    Seeds are always the same, and classes take turns. Latents are not drawn.

    Args:
        tell: gets a sentence if samples are not finite; they are left white.
    """
    network = run.ema.network
    model = Denoiser(network) if run.config.stage == "teacher" else Generator(network, run.config)
    if is_latent(model):
        return
    seeds = range(COLUMNS * ROWS)
    labels = [seed % network.label_dim for seed in seeds] if network.label_dim else None
    images = torch.cat([sample(model, nfe, seeds=seeds, labels=labels) for nfe in run.recipe.sampling.nfe])
    if not run.engine.is_main:
        return
    path, broken = grid_path(folder, run.images), not_finite(images)
    if broken.any():
        images[broken] = WHITE
        tell(f"{int(broken.sum())} of {len(images)} samples are not finite, and left white in {path}.")
    with atomic_write(path) as new:
        image_grid(to_uint8(images), COLUMNS).save(new, "png")


@torch.no_grad()
def save_role_grid(run: Run, folder: Path, tell: Callable[[str], object]) -> None:
    """Draws folder/IMAGES.png: each role's denoised images of the same noisy data, a row for each role and noise level.

    As the second time, the product gets 0, that of the data, and other roles get the largest. The guidance weight is
    the smallest. The networks are those in training, because sample grids show the averages. Latents are not drawn.

    Args: as for `save_sample_grid`.
    """
    network = run.ema.network
    if is_latent(Denoiser(network)):
        return
    x0, labels, _ = run.stream().read(0, COLUMNS)
    z = SeededNoise(range(COLUMNS)).normal(x0.shape[1:]).to(x0) * network.sigma_data
    last = sigma_to_time(network.sigma_max, network.sigma_data).to(x0.device)
    networks = {name: run.networks[name] for name, role in run.recipe.roles.items() if role.ema_of is None}
    rows = []
    for sigma in GRID_SIGMAS:
        t = sigma_to_time(sigma, network.sigma_data).to(x0.device)
        x_t = diffuse(x0, z, t)
        rows.append((f"data at sigma {sigma:g}", x_t))
        for role, module in networks.items():
            if isinstance(module, FlowNetwork):
                second = torch.zeros_like(last) if role == run.method.product else last
                w = torch.tensor(run.recipe.guidance[0]) if module.guided else None
                F = module.eval()(x_t, t, labels, second if module.two_time else None, w=w)
                rows.append((role, denoised(x_t, F, t, module.sigma_data)))
    if not run.engine.is_main:
        return
    path = grid_path(folder, run.images)
    for role, images in rows:
        if (broken := not_finite(images)).any():
            images[broken] = WHITE
            tell(f"{int(broken.sum())} of {len(images)} images in row {role} are not finite, and left white in {path}.")
    with atomic_write(path) as new:
        named_rows([(name, to_uint8(images)) for name, images in rows]).save(new, "png")


def save_generator(run: Run, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Saves the average as a checkpoint ready for use, in place of the last.  weights: of the average, unsharded."""
    config = replace(run.config, images_seen=run.images, ema=run.ema.profile.describe())
    save_checkpoint(folder, run.ema.network, config, overwrite=True, tensors=weights)


def save_ema_snapshots(run: Run, folder: Path) -> None:
    """Saves the power-function averages, for post-hoc EMA. All processes call it together.

    Raises: Diverged: a weight is NaN or infinite.  CheckpointError: the disk refuses.
    """
    require_finite(run.networks, run.images, run.engine.any_process)
    for average in run.averages:
        if isinstance(average.profile, PowerFunction):
            network, profile = average.network.network, Profile(run.images, average.profile.sigma_rel)
            weights, constants = run.engine.full_state(network), {name for name, _ in network.named_buffers()}
            run.engine.on_main(partial(save_snapshot, folder, profile, weights, constants))
