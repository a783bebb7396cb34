"""The diffusion loss of teachers by noise level, to tell whether a modified teacher is as good as the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.checkpoints.encoder import latent_encoder
from edmdistill.checkpoints.load import read_teacher
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.fit import require_fit
from edmdistill.data.latents import draw_latents
from edmdistill.draws import Draws
from edmdistill.errors import DatasetError, NotFiniteError, counted
from edmdistill.networks.flow import FlowNetwork
from edmdistill.trigflow import diffuse, sigma_to_time, velocity

SIGMAS = (0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0)
"""Noise levels. Below them F is nearly the noise itself; above, nearly the mean of the data."""
TOLERATED = 0.02
"""Share by which a loss may exceed the original's."""


class NoiseLevelLoss(NamedTuple):
    """Mean of |F - v / sigma_data|^2 over pixels and channels, of each teacher, at one noise level."""

    sigma: float
    losses: tuple[float, ...]


@torch.no_grad()
def losses_by_noise(
    sources: Sequence[str | Path],
    data: str | Path,
    *,
    split: str = "train",
    images: int | None = None,
    batch: int = 250,
    device: torch.device | str = "cpu",
) -> list[NoiseLevelLoss]:
    """Returns every teacher's loss at each of SIGMAS, on the same images and noise.

    Args:
        sources: teachers, as `train` takes them.
        images: number of images, from the first; None: 1000, or all of fewer.
    Raises:
        CheckpointError, DatasetError: a source cannot be opened or is a generator, or the data do not fit.
        NotFiniteError: a loss is NaN or infinite.
    """
    dataset = open_dataset(data, split=split)
    if images is not None and images > len(dataset):
        raise DatasetError(
            f"{data} has {counted(len(dataset), 'image')}, fewer than the {images:,} asked for: ask for fewer"
        )
    count = images or min(1000, len(dataset))
    columns = [_losses(source, dataset, count, batch, torch.device(device)) for source in sources]
    for source, losses in zip(sources, columns, strict=True):
        if bad := [f"{sigma:g}" for sigma, loss in zip(SIGMAS, losses, strict=True) if not math.isfinite(loss)]:
            raise NotFiniteError(
                f"the loss of {source} is not finite at sigma {', '.join(bad)}: check it with edmdistill inspect"
            )
    return [NoiseLevelLoss(sigma, losses) for sigma, losses in zip(SIGMAS, zip(*columns, strict=True), strict=True)]


def _losses(source: str | Path, dataset: Dataset, images: int, batch: int, device: torch.device) -> list[float]:
    flow, config = read_teacher(source)
    require_fit(dataset, flow, config)
    scaling = latent_encoder(config.encoder)
    flow = flow.to(device).eval()
    flow.network.fold()
    sums = torch.zeros(len(SIGMAS), dtype=torch.float64, device=device)
    for start in range(0, images, batch):
        stop = min(start + batch, images)
        draws = Draws(0, stop, slice(start, stop))
        x0, labels = dataset.tensors(range(start, stop))
        if scaling is not None:
            x0 = draw_latents(x0, draws.normal_like(x0.chunk(2, dim=1)[0]), scaling)
        z = draws.normal_like(x0, flow.sigma_data)
        x0, z, labels = x0.to(device), z.to(device), None if labels is None else labels.to(device)
        sums += torch.stack([_loss(flow, x0, z, sigma, labels) for sigma in SIGMAS])
    return [float(total) for total in sums / images]


def _loss(flow: FlowNetwork, x0: Tensor, z: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """Returns the sum over images of the mean over pixels.  []"""
    t = sigma_to_time(sigma, flow.sigma_data).to(x0.device).expand(len(x0))
    error: Tensor = flow(diffuse(x0, z, t), t, labels) - velocity(x0, z, t) / flow.sigma_data
    return error.double().square().flatten(1).mean(1).sum()


def table(rows: Sequence[NoiseLevelLoss]) -> str:
    """Returns the losses of one or two teachers as text, a line for each noise level."""
    lines = []
    for sigma, losses in rows:
        ratio = [losses[0] / losses[1]] if len(losses) == 2 else []
        lines.append(f"{sigma:8g} " + " ".join(f"{value:10.4f}" for value in (*losses, *ratio)))
    names = ("teacher", "original", "ratio")[: 1 if len(rows[0].losses) == 1 else 3]
    return "\n".join([f"{'sigma':>8} " + " ".join(f"{name:>10}" for name in names), *lines])


def verdict(rows: list[NoiseLevelLoss]) -> str:
    """Returns a sentence on whether the first teacher is as good as the second."""
    excess, sigma = max((row.losses[0] / row.losses[1] - 1, row.sigma) for row in rows)
    if excess <= TOLERATED:
        return f"The first is as good as the second: at no noise level is its loss more than {TOLERATED:.0%} above."
    return f"The first is not yet as good as the second: at sigma {sigma:g} its loss is {excess:.1%} above. Train on."
