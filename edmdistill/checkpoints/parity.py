"""Compares a converted checkpoint with its source: both denoise the same images, at several noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from edmdistill.checkpoints.conversion_report import ParityRow
from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.magnitude import scale_results
from edmdistill.schedules import edm_sigmas, generator_sigmas
from edmdistill.trigflow import denoised, sigma_to_time

Parity = Literal["full", "quick", "none"]
SMALL = 2**26
"""Number of parameters up to which the quick comparison is made in float64 too, and at as many levels as the full.

Larger networks are compared at two, with a class and without, where all of D comes from the network. Toward sigma_min
D is its input, whatever the network returns.
"""


class ParityPlan(NamedTuple):
    """What two networks are compared on: an image at each noise level.

    Attributes:
        size: of the images, in pixels.
        sigmas: the noise levels.  [levels] float64
        batch: number of images in a pass.
        dtypes: of the networks.
    """

    size: int
    sigmas: Tensor
    batch: int
    dtypes: tuple[torch.dtype, ...]


def plan_comparison(flow: FlowNetwork, parity: Parity) -> ParityPlan:
    """Returns what to compare on.  A quick comparison's images are 2 pixels wide where the network's are narrowest."""
    both, size = (torch.float32, torch.float64), flow.img_resolution
    sigmas = edm_sigmas(8, flow.sigma_min, flow.sigma_max)
    if parity == "full":
        return ParityPlan(size, sigmas, 1, both)
    size = min(size, 2 ** len(flow.network.arguments["channel_mult"]))
    large = sum(parameter.numel() for parameter in flow.parameters()) > SMALL
    if large:
        return ParityPlan(size, generator_sigmas(2, flow.sigma_min, flow.sigma_max), 2, (torch.float32,))
    return ParityPlan(size, sigmas, 8, both)


def compare(
    folder: Path, expected: Mapping[torch.dtype, Tensor], comparison: ParityPlan, on_progress: Callable[[str], object]
) -> tuple[ParityRow, ...]:
    """Returns how far a written checkpoint is from `expected`, its source's images by dtype, at each noise level."""
    written, _ = load_checkpoint(folder)
    if torch.float64 in comparison.dtypes:
        written.network.fold(lay_out=False)
    else:  # folding would copy the weights, which are mapped from the file; this differs from it by rounding alone
        scale_results(written.network)
    errors = [
        _relative(denoised_images(written, dtype, comparison, on_progress), images)
        for dtype, images in expected.items()
    ]
    columns = errors if len(errors) == 2 else [*errors, [None] * len(errors[0])]
    return tuple(map(ParityRow, comparison.sigmas.tolist(), *columns))


@torch.no_grad()
def denoised_images(
    flow: FlowNetwork, dtype: torch.dtype, comparison: ParityPlan, on_progress: Callable[[str], object]
) -> Tensor:
    """Returns denoised images, one at each noise level: on the circle with two times, else in EDM's view."""
    flow, size = flow.to(dtype).eval(), comparison.size
    sigmas = comparison.sigmas.reshape(-1, 1, 1, 1)
    rng = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, len(sigmas), flow.img_channels, size, size, generator=rng, dtype=torch.float64)
    x = flow.sigma_data * x0 + sigmas * n
    labels = torch.zeros(len(sigmas), flow.label_dim)
    for index in range(0, len(sigmas), 2) if flow.label_dim else ():  # every second image has no class
        labels[index, index % flow.label_dim] = 1
    results = []
    for rows in torch.split(torch.arange(len(sigmas)), comparison.batch):
        on_progress(f"comparing images of {size}x{size} in {str(dtype).removeprefix('torch.')}")
        classes, sigma = labels[rows] if flow.label_dim else None, sigmas[rows].flatten()
        if flow.two_time:
            t = sigma_to_time(sigma, flow.sigma_data)
            x_t = (t.cos().reshape(-1, 1, 1, 1) * x[rows]).to(dtype)
            results.append(denoised(x_t, flow(x_t, t, classes, second=math.pi / 2 - t), t, flow.sigma_data))
        else:
            results.append(Denoiser(flow)(x[rows].to(dtype), sigma, classes))
    return torch.cat(results)


def _relative(a: Tensor, b: Tensor) -> list[float]:
    """Returns the largest difference of each image, relative to its largest pixel.  [B,C,H,W]"""
    errors: list[float] = ((a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)).tolist()
    return errors
