"""Gamma-sampling: how every generator is sampled, in as many network evaluations as there are times."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from edmdistill.trigflow import diffuse, implied_noise


def gamma_sampler(
    generator: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    times: Tensor,
    sigma_data: float,
    gamma: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Jumps to the data and goes back part of the way, with old noise and new, once for each time.

        x0  = G(x_t, t)
        x_s = cos(s) x0 + sin(s) (sqrt(1 - gamma^2) n + gamma z),    n = (x_t - cos(t) x0) / sin(t)

    gamma = 1 takes fresh noise z only: CoSIM's algorithm 1 and the multistep sampler of consistency models. gamma = 0
    keeps the noise n that x_t implies: no draw counts, and if G is a denoiser this is DDIM. Where x0 is a draw of the
    data and n an independent noise, x_s has the law of the diffused data for every gamma.

    Args:
        generator: (x_t, t [], labels) -> x0.
        noise: unit normal; the start is sin(t) sigma_data noise, which is sigma noise in EDM's scale.  [B,C,H,W]
        labels: handed to the generator.
        times: from noise to data, each in (0, pi/2], falling; one may follow itself (CoSIM, proposition 3.8).  [nfe]
        gamma: share of fresh noise, in [0, 1].
        randn_like: unit normal noise of the shape of its argument.
    Returns: x0 [B,C,H,W].
    Source: CoSIM, algorithm 1 and eq. 18; Kim et al. 2024 (CTM), algorithm 2, for gamma.
    Differs: CTM's network jumps to any time; here it jumps to the data, and the implied noise leads back. So gamma = 0
        is not exact for the true consistency function, as it is in CTM; gamma = 1 is, and every gamma is for a G that
        draws from the posterior of the data.
    """
    x = diffuse(torch.zeros_like(noise), sigma_data * noise, times[0])
    x0 = generator(x, times[0], labels)
    for t, s in pairwise(times):
        z = math.sqrt(1 - gamma**2) * implied_noise(x, x0, t) + gamma * sigma_data * randn_like(noise)
        x = diffuse(x0, z, s)
        x0 = generator(x, s, labels)
    return x0
