"""Moment matching of groups of images: the squared MMD, and the paths on whose time t is drawn and weighted.

Source: Zhou, Ermon & Song 2025 (IMM).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-8
"""Smallest distance of a kernel; closer particles have no gradient."""


class Path(NamedTuple):
    """A path from data to noise, of time tau in [0, 1).

    Attributes:
        eta, tau: tau -> eta = sigma / alpha = tan(t), and back.
        alpha: eta -> alpha.
        speed: alpha^2 deta/dtau, which is constant.
    """

    eta: Callable[[Tensor], Tensor]
    tau: Callable[[Tensor], Tensor]
    alpha: Callable[[Tensor], Tensor]
    speed: float


PATHS = {
    "ot-fm": Path(lambda tau: tau / (1 - tau), lambda eta: eta / (1 + eta), lambda eta: 1 / (1 + eta), 1.0),
    "cosine": Path(
        lambda tau: (math.pi / 2 * tau).tan(),
        lambda eta: 2 / math.pi * eta.atan(),
        lambda eta: (1 + eta**2).rsqrt(),
        math.pi / 2,
    ),
}
"""OT-FM: (alpha, sigma) = (1 - tau, tau). Cosine: TrigFlow's circle, at a quarter of its speed."""


def elbo_weight(eta: Tensor, path: Path, a: float, b: float) -> Tensor:
    """Returns w = 1/2 sigmoid(b - lambda) (-dlambda/dtau) alpha^a / (alpha^2 + sigma^2), lambda = -2 ln(eta).  [B]

    Source: IMM, eq. 13.
    """
    alpha = path.alpha(eta)
    slope = 2 * path.speed / (alpha**2 * eta)  # -dlambda/dtau
    return 0.5 * torch.sigmoid(b + 2 * eta.log()) * slope * alpha**a / (alpha**2 * (1 + eta**2))


def squared_mmd(y_t: Tensor, y_r: Tensor, c_out: Tensor, particles: int) -> Tensor:
    """Returns each particle's part of its group's MMD^2, whose mean over the group is the V-statistic.  [B]

        1/M sum_j [k(y_t^i, y_t^j) + k(y_r^i, y_r^j) - 2 k(y_t^i, y_r^j)],   k(y, y') = exp(-|y - y'| / (c_out D))

    Args:
        y_t, y_r: particles, a group's one after the other.  [B,C,H,W]
        c_out: scale of the network's output in them, the same in a group; at 0 no particle has a gradient.  [B]
        particles: M, of a group; divides B.
    Source: IMM, eq. 67; section 4.2 for the kernel.  Differs: 1 is taken from every kernel, which the sum cancels.
    """
    y_t, y_r = (y.reshape(-1, particles, y[0].numel()) for y in (y_t, y_r))
    scale = (c_out[::particles] * y_t.shape[2]).to(y_t).clamp(min=SMALLEST)[:, None, None]

    def k(x: Tensor, y: Tensor) -> Tensor:
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.expm1(-distance.clamp(min=SMALLEST) / scale)

    return (k(y_t, y_t) + k(y_r, y_r) - 2 * k(y_t, y_r)).mean(2).flatten()
