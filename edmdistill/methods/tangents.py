"""Derivatives of a network along a direction in (x_t, t), by two methods of the same signature."""

from __future__ import annotations

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
