"""What a run shows and hands over on its way: pictures at fixed seeds, and the product's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.aside import aside
from edmdistill.checkpoints.store import Generator, save_checkpoint
from edmdistill.networks.preconditioning import Denoiser
from edmdistill.sampling.generate import is_latent, sample
from edmdistill.sampling.grid import image_grid, to_uint8
from edmdistill.training.run import Run

COLUMNS, ROWS = 10, 2
"""Pictures for each number of steps."""


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
    with aside(folder / f"{run.images:09d}.png") as new:
        image_grid(to_uint8(images), COLUMNS).save(new, "png")


def publish(run: Run, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """The average as a checkpoint ready for use, in place of the one before.  weights: of the average, whole."""
    own = run.recipe.ema
    ema = {"half_life_images": own.half_life_images, "rampup_ratio": own.rampup_ratio}
    save_checkpoint(
        folder, run.ema.network, replace(run.config, images_seen=run.images, ema=ema), overwrite=True, tensors=weights
    )
