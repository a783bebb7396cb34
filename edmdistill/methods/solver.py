"""The way along a flow: Heun's method in EDM's scale, from one time to an earlier one.

dx/dsigma = (x - D(x; sigma)) / sigma is the noise z / sigma_d that x_t implies, z = sin(t) x_t + cos(t) sigma_d F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edmdistill.trigflow import cos_sin, ddim_step, expand

Flow = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t [B]) -> F."""


def heun_step(flow: Flow, x_t: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """x_s from x_t, s <= t, by two calls: Euler's step, which is DDIM's, and half of what the noise changes on it.

        x_s = x_s' - sin(t-s) / cos(t) (z_s' - z_t) / 2

    Where s = t, x_t itself.
    Source: Karras et al. 2022 (EDM), algorithm 1, times cos(s).
    """

    def noise(x: Tensor, F: Tensor, time: Tensor) -> Tensor:
        cos, sin = cos_sin(time, x)
        return sin * x + cos * sigma_data * F

    F = flow(x_t, t)
    ahead = ddim_step(x_t, F, t, s, sigma_data)
    change = noise(ahead, flow(ahead, s), s) - noise(x_t, F, t)
    half = expand(t - s, x_t).sin() / expand(t, x_t).cos() / 2
    return ahead - half.to(x_t.dtype) * change


def follow_flow(
    flow: Flow, x: Tensor, times: Tensor, start: Tensor, stop: Tensor, steps: int, sigma_data: float
) -> Tensor:
    """x at times[stop], from x at times[start], by Heun steps from point to point.

    All rows take `steps` steps, and stand still once they are there: so every process calls the network as often.

    Args:
        times: falling.  [N]
        start, stop: of each row, start <= stop <= start + steps.  int64 [B]
    """
    for step in range(steps):
        t, s = times[torch.minimum(start + step, stop)], times[torch.minimum(start + step + 1, stop)]
        x = heun_step(flow, x, t, s, sigma_data)
    return x
