"""Closed forms for Gaussian data, and networks that are functions, for the tests of consistency methods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIGMA_DATA, STD = 0.5, 0.3
"""Of TrigFlow, and of the data."""
TIMES = torch.tensor([0.02, 0.4, 0.9, 1.3, 1.55], dtype=torch.float64)


def spread(t: Tensor) -> Tensor:
    """The standard deviation of x_t."""
    return (t.cos() ** 2 * STD**2 + t.sin() ** 2 * SIGMA_DATA**2).sqrt()


def over(x: Tensor, t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def teacher(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """F of the diffusion of N(0, STD^2): the velocity is x d ln(spread)/dt."""
    t = over(x, t)
    return x * t.cos() * t.sin() * (SIGMA_DATA**2 - STD**2) / spread(t) ** 2 / SIGMA_DATA


def truth(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """F of the true consistency function to the time t - d: x_s = x spread(s) / spread(t)."""
    t, d = over(x, t), over(x, d)
    return (d.cos() * x - x * spread(t - d) / spread(t)) / (d.sin() * SIGMA_DATA)


def answer(F: Callable[..., Tensor], point: tuple[Tensor, ...], along: tuple[Tensor, ...], *more: Tensor) -> Any:
    """What a network returns: F at a point, its derivative along a direction if one is given, and more."""
    value = F(*point)
    if not along:
        return (value, *more) if more else value
    along += tuple(map(torch.zeros_like, point[len(along) :]))
    with torch.no_grad():
        return value, torch.func.jvp(F, point, along)[1], *more


class Toy(nn.Module):
    """A network as methods know it, from a function of x and t."""

    def __init__(self, F: Callable[..., Tensor], u: Tensor | None = None) -> None:
        super().__init__()
        self.F = F
        self.u = u

    def forward(self, x: Tensor, t: Tensor, labels=None, second=None, u_at=(), along=()):
        u = torch.zeros(1, dtype=torch.float64) if self.u is None else self.u
        return answer(self.F, (x, t), along, *map(u.expand_as, u_at))


class Scaled(nn.Module):
    """F = a(t) x, or a(t, w) x with a guidance weight, whose tangent is explicit."""

    a: Callable[..., tuple[Tensor, Tensor]]
    """Returns a and da/dt."""

    def forward(self, x: Tensor, t: Tensor, labels=None, second=None, *, u_at=(), w: Tensor | None = None, along=()):
        a, slope = (over(x, part) for part in (self.a(t) if w is None else self.a(t, w)))
        u = map(torch.zeros_like, u_at)
        if along:
            dx, dt = along
            return a * x, (a * dx + slope * over(x, dt) * x).detach(), *u
        return (a * x, *u) if u_at else a * x


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TIMES), 3, 4, 4, dtype=torch.float64, generator=generator) * spread(over(TIMES, TIMES))
