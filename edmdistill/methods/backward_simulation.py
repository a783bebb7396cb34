"""Backward simulation: images of a generator of several steps, each of which starts from its own image of the last.

    x_1 = pure noise,    g_k = D_theta(x_k; sigma_k),    x_(k+1) = g_k with noise of level sigma_(k+1)

Source: Yin et al. 2024 (DMD2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.methods.base import Batch, FlowFunction, NoiseRange
from edmdistill.methods.noising import initial_noise, noised, one_step, time_of_rows
from edmdistill.trigflow import denoised

StepLevels = Annotated[
    tuple[Annotated[float, Meta(gt=0)], ...], Meta(description="noise levels of the steps after the first, descending")
]


def require_descending(levels: Sequence[float]) -> None:
    """Raises: ValueError: the levels of a generator's steps do not decrease."""
    if list(levels) != sorted(set(levels), reverse=True):
        raise ValueError(f"levels = {list(levels)} must decrease: each step starts below the one before")


def step_levels(levels: Sequence[float], noise: NoiseRange) -> tuple[float, ...]:
    """Returns the noise levels of all steps, the first from sigma_max.

    Raises: EdmDistillError: the first one's is among those of the later ones.
    """
    if levels and levels[0] >= noise.sigma_max:
        raise EdmDistillError(
            f"method.levels = {list(levels)} begins at {noise.sigma_max:g}, where the first step starts: they are "
            "those of the later steps, so leave it out"
        )
    return noise.sigma_max, *levels


def of_one_step(
    generator: FlowFunction, batch: Batch, levels: Sequence[float], draws: Draws, noise: NoiseRange
) -> Tensor:
    """Returns images of a step that is drawn for the whole batch; gradients flow through this step alone.  [B,C,H,W]

    Args:
        levels: noise levels of the steps after the first, descending.
    """
    x_t, t = initial_noise(batch.x0, noise.sigma_max, draws, noise.sigma_data)
    for sigma in levels[: int(draws.common() * (1 + len(levels)))]:
        with torch.no_grad():
            g = denoised(x_t, generator(x_t, t, batch.labels), t, noise.sigma_data)
            t = time_of_rows(g, sigma, noise.sigma_data)
            x_t, _ = noised(g, t, draws, noise.sigma_data)
    return denoised(x_t, generator(x_t, t, batch.labels), t, noise.sigma_data)


def of_every_step(
    generator: FlowFunction, batch: Batch, levels: Sequence[float], draws: Draws, noise: NoiseRange
) -> Tensor:
    """Returns images of all steps, each row's of one that is drawn for it.  Args: see `of_one_step`.  [B,C,H,W]

    Differs: the official code draws one step for the batch. In short runs the auxiliary score then forgets one step for
        the other, and a class's images become one.
    """
    if not levels:
        return one_step(generator, batch, noise.sigma_max, draws, noise.sigma_data)[0]
    steps = draws.uniform() * (1 + len(levels))
    g, _ = one_step(generator, batch, noise.sigma_max, draws, noise.sigma_data)
    for step, sigma in enumerate(levels, 1):
        t = time_of_rows(g, sigma, noise.sigma_data)
        x_t, _ = noised(g, t, draws, noise.sigma_data)
        later = denoised(x_t, generator(x_t, t, batch.labels), t, noise.sigma_data)
        g = torch.where((steps >= step).to(g.device)[:, None, None, None], later, g)
    return g


def of_noisy_data(
    generator: FlowFunction, batch: Batch, levels: Sequence[float], draws: Draws, noise: NoiseRange
) -> Tensor:
    """Returns images of one step each, drawn for its row; later ones than the first start from data of their level.

    No backward simulation: the first step starts from noise alone, a later one from x_t = cos(t) x0 + sin(t) z.
    Args: see `of_one_step`.  [B,C,H,W]
    Source: DMD2's official code without --backward_simulation; FastGen's.
    """
    step = (draws.uniform() * (1 + len(levels))).long()
    t = time_of_rows(batch.x0, noise.sigma_max, noise.sigma_data)
    for k, sigma in enumerate(levels, 1):
        t = torch.where(step == k, time_of_rows(batch.x0, sigma, noise.sigma_data), t)
    x_t, _ = noised(batch.x0 * (step > 0).to(batch.x0)[:, None, None, None], t, draws, noise.sigma_data)
    return denoised(x_t, generator(x_t, t, batch.labels), t, noise.sigma_data)
