"""Jumps between the times of a grid, and the part of them that a solver goes along the teacher's trajectory."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Protocol

from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.schedules import ctm_indices
from edmdistill.trigflow import diffuse

JumpDistribution = Annotated[
    Literal["official", "paper"], Meta(description="distribution of t, s, u: official code's or paper's")
]
Matching = Annotated[
    Literal["soft", "local", "global"], Meta(description="the solver goes part of the way to s, one step, or all")
]
Inner = Annotated[Literal["average", "live"], Meta(description="network of the jump from u to s: target or generator")]


class Jump(NamedTuple):
    """A jump from x_t at t to s, and a time u between them.

    Attributes:
        t, s, u: s <= u < t.  [B]
        x_t: data with noise.  [B,C,H,W]
        times: the grid, decreasing.  [N]
        start, stop: indices of t and u in the grid.  [B] int64
        steps: the solver's, from t to u.
    """

    t: Tensor
    s: Tensor
    u: Tensor
    x_t: Tensor
    times: Tensor
    start: Tensor
    stop: Tensor
    steps: int


class JumpConfig(Protocol):
    """Options of `ctm_indices`."""

    @property
    def max_steps(self) -> int: ...
    @property
    def sampling(self) -> JumpDistribution: ...
    @property
    def matching(self) -> Matching: ...
    @property
    def one_step_share(self) -> float: ...


def draw_jump(x0: Tensor, times: Tensor, draws: Draws, sigma_data: float, config: JumpConfig) -> Jump:
    """Draws a jump for each image.  Source: Kim et al. 2024 (CTM), algorithm 4, lines 2-5.

    Args:
        x0: images.  [B,C,H,W]
        times: decreasing, on the same device.  [N]
    """
    start, end, stop, steps = ctm_indices(
        draws,
        len(times),
        max_steps=config.max_steps,
        sampling=config.sampling,
        matching=config.matching,
        one_step_share=config.one_step_share,
    )
    x_t = diffuse(x0, draws.normal_like(x0, sigma_data), times[start])
    return Jump(times[start], times[end], times[stop], x_t, times, start, stop, steps)
