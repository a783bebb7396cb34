"""Discrete pairs of consistency training: a point at two noise levels, with one noise for both.

    x_t = x0 + sigma_t eps,   x_r = x0 + sigma_r eps,   sigma_r = sigma_t (1 - n(sigma_t) gap)
    d(f(x_t, t), f^-(x_r, r)),   f^-(x, 0) = x

In distillation x_r is where the teacher's step from x_t ends. Here in TrigFlow. Source: Geng et al. 2024 (ECT), and the
official code (training/loss.py); Song et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

CLOSEST = 2.0**-20
"""Smallest relative distance of a pair: closer, float32 sees one noise level, and the distance has no gradient."""
Gap = Annotated[
    float, Meta(ge=CLOSEST, lt=1, description="relative distance of a pair, before it is widened at low noise")
]

Weighting = Annotated[
    Literal["gap", "c_out", "none"],
    Meta(description="weight: gap = 1 / (sigma_t - sigma_r); c_out = 1 / sigma_t^2 + 1 / sigma_d^2; none = 1"),
]


class PairsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of every method that learns by pairs."""

    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.1
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 2.0
    k: Annotated[float, Meta(ge=0, le=1e6, description="how much wider pairs are at low noise")] = 8.0
    b: Annotated[float, Meta(gt=0, le=1e6, description="how fast that ends as sigma rises")] = 1.0
    c: Annotated[float, Meta(ge=0, le=1e6, description="constant of the pseudo-Huber distance; 0 = L2 norm")] = 0.0
    weighting: Weighting = "gap"

    def __post_init__(self) -> None:
        if not self.k:
            refuse_idle(self, ("b",), "k = 0", "set k above 0")


class ClosingPairsConfig(PairsConfig, frozen=True, forbid_unknown_fields=True):
    """Options of pairs that close in over a run."""

    q: Annotated[float, Meta(gt=1, le=1e6, description="factor by which a pair closes in at each stage")] = 2.0
    stage_images: Annotated[int, Meta(ge=1, description="images of a stage")] = 25_600_000


class Pair(NamedTuple):
    """The distance of f(x_t, t) from f^-(x_r, r), with gradient.  [B]

    Attributes:
        t, r: times.  [B]
        estimate: f(x_t, t), detached.  [B,C,H,W]
    """

    distance: Tensor
    t: Tensor
    r: Tensor
    estimate: Tensor


def compare_pair(
    network: FlowFunction,
    batch: Batch,
    sigma_t: Tensor,
    sigma_r: Tensor,
    draws: Draws,
    *,
    sigma_data: float,
    distance: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    step: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Pair:
    """Draws the noise of a pair and returns the distance of f(x_t, t) from f^-(x_r, r).

    Args:
        sigma_t, sigma_r: noise levels, sigma_r < sigma_t.  [B]
        distance: of two batches of images, for each sample; as `norm_distance`.
        target: (x_r, r, labels) -> F; None: the network itself.
        step: (x_t, t, r) -> x_r; None: x_r has the noise of x_t.
    """
    z = draws.normal_like(batch.x0, sigma_data)
    t, r = sigma_to_time(sigma_t, sigma_data), sigma_to_time(sigma_r, sigma_data)
    x_t = diffuse(batch.x0, z, t)
    with torch.no_grad():  # so that both share the dropout of the next pass
        x_r = diffuse(batch.x0, z, r) if step is None else step(x_t, t, r)
        x0_r = denoised(x_r, (target or network)(x_r, r, batch.labels), r, sigma_data)
    x0_t = denoised(x_t, network(x_t, t, batch.labels), t, sigma_data)
    return Pair(distance(x0_t, x0_r), t, r, x0_t.detach())


def norm_distance(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Returns sqrt(|a - b|^2 + c^2) - c, summed over pixels: the L2 norm at c = 0.  a, b [B,C,H,W] -> [B]"""
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


def closing_pair(draws: Draws, images: int, config: ClosingPairsConfig) -> tuple[Tensor, Tensor]:
    """Draws sigma_t, and returns it with sigma_r after so many images.  [B] each

    Source: ECT.  Differs: 1 / q^(1 + stage) stays above CLOSEST.
    """
    gap = max(config.q ** -(1 + images // config.stage_images), CLOSEST)
    sigma_t = lognormal_sigmas(draws, P_mean=config.P_mean, P_std=config.P_std)
    return sigma_t, paired_sigma(sigma_t, gap, config.k, config.b)


def paired_sigma(sigma: Tensor, gap: float, k: float, b: float) -> Tensor:
    """Returns sigma_r = max(0, sigma (1 - (1 + k / (1 + e^(b sigma))) gap)).  sigma, sigma_r [B]

    Source: ECT's mapping function, as in the official code.
    """
    return (sigma * (1 - (1 + k * torch.sigmoid(-b * sigma)) * gap)).clamp(min=0)


def pair_weight(weighting: str, sigma_t: Tensor, sigma_r: Tensor, sigma_data: float) -> Tensor:
    """Returns the weight of a pair's distance by an option of PairsConfig; c_out's is EDM's 1 / c_out^2.  [B]"""
    if weighting == "none":
        return torch.ones_like(sigma_t)
    return 1 / (sigma_t - sigma_r) if weighting == "gap" else sigma_t**-2 + sigma_data**-2
