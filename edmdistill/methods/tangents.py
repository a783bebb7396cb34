"""Derivatives of a network along a direction in (x_t, t), by two methods of the same signature."""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.methods.base import FlowFunction


def jvp(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    dt: Tensor,
    u_at: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Returns F, its derivative along (dx, dt), exactly and without gradient, and u: all from one forward pass."""
    return network(x_t, t, labels, along=(dx, dt), u_at=u_at)


def finite_difference(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    dt: Tensor,
    u_at: tuple[Tensor, ...],
    h: float = 5e-3,
) -> tuple[Tensor, ...]:
    """Returns the same by central differences: three forward passes, an error of O(h^2).

    For networks in float32 only: in half precision the rounding error of F, divided by h, exceeds the derivative.
    """
    with torch.no_grad():  # and before the pass with gradient, so that all three share its dropout
        ahead, behind = (network(x_t + step * dx, t + step * dt, labels) for step in (h, -h))
    F, *u = network(x_t, t, labels, u_at=u_at)
    return F, (ahead - behind) / (2 * h), *u


TANGENTS = {"exact": jvp, "finite-difference": finite_difference}
