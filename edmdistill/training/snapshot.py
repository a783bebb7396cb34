"""Snapshots of a run: image grids at fixed seeds, the product's checkpoint, and averages for post-hoc EMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.posthoc_ema import Profile, save_snapshot
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.decode import Decoder, open_decoder, vae_on
from edmdistill.sampling.generate import not_finite, sample
from edmdistill.sampling.grid import image_grid, named_rows, save_grid, thumbnails
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.training.ema import PowerFunction
from edmdistill.training.monitors import require_finite
from edmdistill.training.run import Run
from edmdistill.training.run_dir import RunDir
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

COLUMNS, ROWS = 10, 2
"""Images of a grid for each number of steps."""
GRID_SIGMAS = 0.3, 2.5, 20.0
"""Noise levels at which the networks of a run are compared."""
WHITE = 255


def grid_decoder(encoder: Mapping[str, Any], vae: str | None) -> tuple[Decoder | None, str | None]:
    """Returns what turns a network's images into the pictures of grids, or a sentence on why there are none.

    Args: as for `open_decoder`.
    Raises: CheckpointError: the named VAE cannot be used.  EdmDistillError: a VAE for a network that works on pixels.
    """
    try:
        return open_decoder(encoder, vae), None
    except CheckpointError as error:
        if vae is not None:
            raise
        return None, f"No grids are drawn: {str(error).rstrip('.')}."


def grid_path(folder: Path, images: int) -> Path:
    """Returns the path of the grid after so many images."""
    return folder / f"{images:09d}.png"


def save_sample_grid(run: Run, folder: Path, tell: Callable[[str], object]) -> None:
    """Draws folder/IMAGES.png: samples of the average, two rows for each NFE of the recipe.

    Seeds are always the same, and classes take turns. Nothing is drawn if latents cannot be decoded.

    Args:
        tell: gets a sentence if samples are not finite; they are left white.
    """
    network = run.ema.network
    if not run.has_grids:
        return
    seeds = range(COLUMNS * ROWS)
    labels = [seed % network.label_dim for seed in seeds] if network.label_dim else None
    images = torch.cat([sample(run.model(), nfe, seeds=seeds, labels=labels) for nfe in run.recipe.sampling.nfe])
    if not run.engine.is_main:
        return
    path = grid_path(folder, run.images)
    pixels, broken = _pictures(run, images)
    if broken:
        tell(f"{broken} of {len(images)} samples are not finite, and left white in {path}.")
    with atomic_write(path) as new:
        save_grid(image_grid(pixels, COLUMNS), new)


@torch.no_grad()
def save_role_grid(run: Run, folder: Path, tell: Callable[[str], object]) -> None:
    """Draws folder/IMAGES.png: each role's denoised images of the same noisy data, a row for each role and noise level.

    As the second time, the product gets 0, that of the data, and other roles get the largest. The guidance weight is
    the smallest. The networks are those in training, because sample grids show the averages. Nothing is drawn if
    latents cannot be decoded.

    Args: as for `save_sample_grid`.
    """
    network = run.ema.network
    if not run.has_grids:
        return
    x0, labels, *_ = run.stream().read(0, COLUMNS)
    z = SeededNoise(range(COLUMNS)).normal(x0.shape[1:]).to(x0) * network.sigma_data
    last = sigma_to_time(network.sigma_max, network.sigma_data).to(x0.device)
    networks = {name: run.networks[name] for name, role in run.recipe.roles.items() if role.ema_of is None}
    run.set_trainable(None)
    rows = []
    for sigma in GRID_SIGMAS:
        t = sigma_to_time(sigma, network.sigma_data).to(x0.device)
        x_t = diffuse(x0, z, t)
        rows.append((f"data at sigma {sigma:g}", x_t))
        for role, module in networks.items():
            if isinstance(module, FlowNetwork):
                second = torch.zeros_like(last) if role == run.method.product else last
                w = torch.tensor(run.recipe.guidance[0]) if module.guided else None
                F = module(x_t, t, labels, second if module.two_time else None, w=w)
                rows.append((role, denoised(x_t, F, t, module.sigma_data)))
    if not run.engine.is_main:
        return
    path = grid_path(folder, run.images)
    pictures = []
    for role, images in rows:
        pixels, broken = _pictures(run, images)
        if broken:
            tell(f"{broken} of {len(images)} images in row {role} are not finite, and left white in {path}.")
        pictures.append((role, pixels))
    with atomic_write(path) as new:
        save_grid(named_rows(pictures), new)


def _pictures(run: Run, images: Tensor) -> tuple[Tensor, int]:
    """Returns pictures of images, white where they are not finite, and how many are not.

    A VAE is on the device only while it decodes, and large pictures are reduced.
    Args:
        images: [B,C,H,W]
    Returns: uint8 [B,C,h,w] on the CPU
    """
    broken, decoder = not_finite(images), run.decoder
    assert decoder is not None
    finite = images.masked_fill(broken.to(images.device)[:, None, None, None], 0)
    with vae_on(run.engine.device, decoder):
        pixels = thumbnails(decoder(finite).cpu())
    pixels[broken.cpu()] = WHITE
    return pixels, int(broken.sum())


def generator_saver(run: Run, folder: Path, weights: Mapping[str, Tensor]) -> Callable[[], object]:
    """Returns what saves the average of this moment as a checkpoint ready for use, in place of the last.

    weights: of the average, unsharded.
    """
    config = replace(run.config, images_seen=run.images, ema=run.ema.profile._asdict())
    return partial(save_checkpoint, folder, run.ema.network, config, overwrite=True, tensors=weights)


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


def save_grids(run: Run, folder: RunDir, tell: Callable[[str], object]) -> dict[str, Path]:
    """Draws a snapshot's grids that do not exist yet: a process may be killed between saving and drawing.

    Returns: those that were drawn, by the name of their folder; on the main process.
    """
    drawn = {}
    for draw, place in ((save_sample_grid, folder.samples), (save_role_grid, folder.x0)):
        if not run.engine.broadcast(grid_path(place, run.images).exists()):
            draw(run, place, tell)
            drawn[place.name] = grid_path(place, run.images)
    return drawn if run.has_grids else {}
