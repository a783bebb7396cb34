"""Solvers of the probability-flow ODE: Heun's method of EDM, from one time to an earlier one, and DPM-Solver++(2M).

In EDM's scale dx/dsigma = (x - D(x; sigma)) / sigma is the noise implied by x_t, z / sigma_d, where
z = sin(t) x_t + cos(t) sigma_d F.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from edmdistill.trigflow import cos_sin, ddim_step, denoised, expand, time_to_sigma

Flow = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], t [B]) -> F [B,C,H,W]."""


def heun_step(flow: Flow, x_t: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Returns x_s from x_t, s <= t, in two evaluations: a DDIM (Euler) step and half the change of the noise over it.

        x_s = x_s' - sin(t-s) / cos(t) (z_s' - z_t) / 2

    Where s = t, it returns x_t exactly; where s = 0, DDIM's step, because there is no noise left there to evaluate.
    Source: Karras et al. 2022 (EDM), algorithm 1, times cos(s).
    """

    def noise(x: Tensor, F: Tensor, time: Tensor) -> Tensor:
        cos, sin = cos_sin(time, x)
        return sin * x + cos * sigma_data * F

    F = flow(x_t, t)
    euler = ddim_step(x_t, F, t, s, sigma_data)
    change = noise(euler, flow(euler, s), s) - noise(x_t, F, t)
    half = torch.where(expand(s, x_t) > 0, expand(t - s, x_t).sin() / expand(t, x_t).cos() / 2, 0.0)
    return euler - half.to(x_t.dtype) * change


def follow_flow(
    flow: Flow, x: Tensor, times: Tensor, start: Tensor, stop: Tensor, steps: int, sigma_data: float
) -> Tensor:
    """Returns x at times[stop] from x at times[start], by Heun steps along the grid.

    Every row takes `steps` steps and stays in place after its end, so all processes call the network equally often.

    Args:
        times: decreasing.  [N]
        start, stop: of each row, start <= stop <= start + steps.  int64 [B]
    """
    for step in range(steps):
        t, s = times[torch.minimum(start + step, stop)], times[torch.minimum(start + step + 1, stop)]
        x = heun_step(flow, x, t, s, sigma_data)
    return x


def multistep_trajectory(flow: Flow, x: Tensor, times: Tensor, sigma_data: float) -> tuple[list[Tensor], Tensor]:
    """Returns the points of a trajectory and its end at time 0, by DPM-Solver++(2M), one evaluation a step.

    Args:
        x: at times[0].  [B,C,H,W]
        times: decreasing, of each row.  [K,B]
    Returns: x at each of the times, K of [B,C,H,W]; the end [B,C,H,W]
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; sCM, eq. 28; the first step and the last, to 0, are DDIM's.
    """
    points = [x]
    x0 = ahead = denoised(x, flow(x, times[0]), times[0], sigma_data)
    lengths = time_to_sigma(times, sigma_data).log().diff(dim=0).neg()
    for k, (t, s) in enumerate(pairwise(times)):
        if k:  # extrapolate D linearly in ln(sigma), from the last step and this one
            before, x0 = x0, denoised(x, flow(x, t), t, sigma_data)
            ahead = x0 + expand(lengths[k] / lengths[k - 1] / 2, x).to(x.dtype) * (x0 - before)
        (cos_t, sin_t), (cos_s, sin_s) = cos_sin(t, x), cos_sin(s, x)
        x = cos_s * ahead + sin_s / sin_t * (x - cos_t * ahead)
        points.append(x)
    return points, x0 if len(points) == 1 else denoised(x, flow(x, times[-1]), times[-1], sigma_data)
