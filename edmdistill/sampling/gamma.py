"""Gamma-sampling, the sampler of all generators: one network evaluation for each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from edmdistill.transfer import to_device
from edmdistill.trigflow import cos_sin


def gamma_sampler(
    jump: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    times: Tensor,
    sigma_data: float,
    gamma: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Jumps below the next time and returns to it by fresh noise, for each time; the last jump leads to the data.

        x_s  = G(x_t, t, s),    sigma(s) = sqrt(1 - gamma^2) sigma(t')
        x_t' = h x_s + gamma sin(t') z,    h = sqrt(1 - gamma^2 sin(t')^2)

    gamma = 1 uses fresh noise z only: CoSIM's algorithm 1 and the multistep sampler of consistency models. gamma = 0
    uses none, whatever is drawn.

    CTM's network jumps along the whole trajectory: with the true G, and x_t distributed as the diffused data, so are
    every x_t' and the result, for every gamma and any times; gamma = 0 gives the end of one trajectory, however many
    steps it is split into. A network of one time jumps to the data alone, and G returns to s by the noise that they
    imply. Then gamma = 0 is DDIM if the network is a denoiser, and not exact for the true consistency function;
    gamma = 1 is exact for it, and every gamma for a network that draws from the posterior of the data.

    Args:
        jump: (x_t, t [], s [], labels) -> x_s.
        noise: unit normal; the start is sin(t) sigma_data noise, which is sigma noise in EDM's scale.  [B,C,H,W]
        labels: passed to the jump.
        times: from noise to data, each in (0, pi/2], falling, may repeat (CoSIM, proposition 3.8).  [nfe]
        gamma: share of fresh noise, in [0, 1].
        randn_like: unit normal noise of the shape of its argument.
    Returns: x0 [B,C,H,W].
    Source: Kim et al. 2024 (CTM), algorithm 2; CoSIM, algorithm 1 and eq. 18.  Differs: CTM's algorithm confuses x
        before and after the noise; here on the circle, where EDM's scale brings in h = cos(t') / cos(s).
    """
    times = to_device(times, noise.device)
    x = cos_sin(times[0], noise)[1] * (sigma_data * noise)
    for t, after in pairwise(times):
        s = torch.atan2(math.sqrt(1 - gamma**2) * after.sin(), after.cos())
        x = jump(x, t, s, labels)
        fresh = gamma * after.sin()
        h = (1 - fresh**2).sqrt()
        x = h.to(x.dtype) * x + fresh.to(x.dtype) * (sigma_data * randn_like(noise))
    return jump(x, times[-1], torch.zeros_like(times[-1]), labels)
