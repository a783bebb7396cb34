"""The tangent of consistency training: dF along the trajectory, its normalization and its warmup.

Source: Lu & Song 2025 (sCM), sections 4.2 and 5.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from edmdistill.methods.base import FlowFunction


def jvp(
    network: FlowFunction, x_t: Tensor, t: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns F and its derivative along (dx, dt), exactly, by forward-mode differentiation."""
    return network.tangent(x_t, t, labels, dx, dt)


def finite_difference(
    network: FlowFunction, x_t: Tensor, t: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor, h: float = 5e-3
) -> tuple[Tensor, Tensor]:
    """Returns F and its derivative along (dx, dt) by central differences: three forward passes, an error of O(h^2).

    For networks in float32 only: in half precision the rounding error of F, divided by h, exceeds the derivative.
    """

    def F(step: float) -> Tensor:
        with torch.no_grad():  # so that all three share the dropout of the next pass
            return network(x_t + step * dx, t + step * dt, labels)

    return F(0.0), (F(h) - F(-h)) / (2 * h)


TANGENTS = {"exact": jvp, "finite-difference": finite_difference}

TangentNormalization = Literal["rms", "norm", "clip"]


def normalized_tangent(g: Tensor, c: float, normalization: TangentNormalization) -> Tensor:
    """Returns g / (|g| + c) for each sample, or g clamped to [-1, 1].  [B,C,H,W]

    Args:
        normalization: "rms": |g| is the root mean square; "norm": the Euclidean norm, as in the paper; "clip".
    Source: sCM, section 4.2.  Differs: the default is the root mean square, for which c = 0.1 means the same at any
        resolution. With the norm, it is 1% of an average pixel's g at 64 values an image, but 0.08% at 16384.
    """
    if normalization == "clip":
        return g.clamp(-1, 1)
    size: Tensor = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
    return g / (size * (g[0].numel() ** -0.5 if normalization == "rms" else 1.0) + c)


def tangent_warmup(images: int, warmup_images: int) -> float:
    """Returns r, which rises linearly from 0 to 1 over the first images.  Source: sCM, section 4.2; 10,000 steps."""
    return 1.0 if images >= warmup_images else images / warmup_images
