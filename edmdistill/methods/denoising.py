"""The denoising loss of a generator of two times, beside the loss of its jumps."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, NoiseRange
from edmdistill.methods.distances import l2
from edmdistill.methods.noising import noised
from edmdistill.schedules import ctm_score_sigmas
from edmdistill.trigflow import sigma_to_time

DenoisingWeight = Annotated[
    Literal["edm", "none"], Meta(description="weighting of the denoising loss over noise levels")
]


def denoising_loss(
    generator: FlowFunction, batch: Batch, draws: Draws, noise: NoiseRange, weight: DenoisingWeight
) -> Tensor:
    """Returns |D(x_t, t) - x0|^2 with EDM's weight, which makes it |F(x_t, t; t) - v / sigma_d|^2.  [B]

    A jump has no gradient at s = t, so this loss is what trains small jumps.

    Source: Kim et al. 2024 (CTM), section 3.3.
    Differs: the paper has no weight, as with "none".
    """
    t = sigma_to_time(ctm_score_sigmas(draws, noise.sigma_min, noise.sigma_max), noise.sigma_data)
    x_t, v = noised(batch.x0, t, draws, noise.sigma_data)
    square = l2(generator(x_t, t, batch.labels, t), v / noise.sigma_data)
    return square if weight == "edm" else square * (noise.sigma_data * t.sin()).to(square) ** 2
