"""The weights of f-distill: a score gap times h(r) is the gradient of an f-divergence, r = p / q of data and images.

Source: Xu et al. 2025 (f-distill), with the two normalizations of NVIDIA's code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

Divergence = Annotated[
    Literal[
        "reverse-kl", "forward-kl", "jensen-shannon", "softened-reverse-kl", "squared-hellinger", "jeffreys", "neyman"
    ],
    Meta(description="whose gradient the generator follows; those other than reverse-kl need the adversary"),
]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "jensen-shannon": lambda r: r / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "squared-hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""h by divergence."""
BINS = 10
"""Bins of the noise level in which the mean ratio is made 1: it is 1 at every level, because r q = p."""


def density_ratio(logits: Tensor) -> Tensor:
    """Returns r = e^logit of the mean logit, within [.1, 20].  [B,n] -> [B]"""
    return logits.mean(1).exp().clamp(0.1, 20.0)


def divergence_weights(divergence: str, r: Tensor, sigma: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Returns h of the normalized density ratio r, divided by the batch mean of h. r is normalized by its bin's mean.

    Args:
        r, sigma: density ratio and noise level of each row.  [B]
    Returns: weights of mean 1.  [B]
    Differs: the code can average the bins' means over steps, which would make a step depend on the ones before.
    """
    bins = ((sigma - sigma_min) / (sigma_max - sigma_min) * BINS).long().clamp(0, BINS - 1)
    sums = r.new_zeros(2, BINS).index_add_(1, bins, torch.stack([r, torch.ones_like(r)]))
    h = WEIGHTS[divergence](r * (sums[1] / sums[0])[bins])
    return h / h.mean()
