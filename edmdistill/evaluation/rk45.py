"""Dormand and Prince's Runge-Kutta method of order 5(4), every row of a batch in steps of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError

NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
"""The fourth order's solution minus the fifth's."""

SAFETY, LEAST, MOST = 0.9, 0.2, 10.0

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [b], state [b,n], which rows of the batch these are [b]) -> the state's derivative [b,n]"""


def rk45(field: Field, state: Tensor, start: float, end: float, *, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
    """Solves dy/dt = field(t, y) from start to end.

    A row's steps depend on that row alone, so it comes out the same in any batch if the field does; a row that has
    arrived is not evaluated any more.

    Args:
        state: y at the start.  [B,n] float64
        end: beyond the start.
        rtol, atol: a step is taken if the rms over its row of error / (atol + rtol max(|y|, |y_new|)) is below 1.
    Returns: y at the end [B,n], and the evaluations of the field that each row took, int64 [B].
    Raises: EdmDistillError: a step would have to be shorter than time can be told apart.
    Source: Dormand & Prince 1980; Hairer, Norsett & Wanner 1993, section II.4, for steps and the first of them.
        Differs: nothing, for one row, from scipy's solve_ivp.
    """
    rows = torch.arange(len(state), device=state.device)
    t = state.new_full((len(state),), start)
    y, slope = state, field(t, state, rows)
    h = _first_step(field, t, y, slope, rows, end - start, rtol, atol)
    shrinks = torch.zeros_like(rows, dtype=torch.bool)  # rows whose last step was refused
    result, evaluations = torch.empty_like(state), torch.full_like(rows, 2)
    while len(rows):
        if bool((h < 10 * t.abs() * torch.finfo(t.dtype).eps).any()) or not bool(h.isfinite().all()):
            raise EdmDistillError(
                f"an ODE could not be solved at time {float(t[0]):.4g}: its step shrinks to nothing, or its slope is "
                "not finite; the network is broken there, or the tolerance is too small"
            )
        last = t + h >= end
        ahead = torch.where(last, end, t + h)
        h = ahead - t

        # Six slopes, the last but one at the end of the step, and the slope there.
        slopes = [slope]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            slopes.append(field(t + node * h, y + h[:, None] * _combined(weights, slopes), rows))
        y_new = y + h[:, None] * _combined(FIFTH, slopes)
        slopes.append(field(ahead, y_new, rows))
        evaluations[rows] += 6

        # Is it good enough, and how long is the next?
        scale = atol + rtol * torch.maximum(y.abs(), y_new.abs())
        error = _rms(h[:, None] * _combined(ERROR, slopes) / scale)
        good = error < 1
        factor = (SAFETY * error**-0.2).clamp(LEAST, MOST)
        h = h * torch.where(good & shrinks, factor.clamp(max=1), factor)
        shrinks = ~good

        # Go on with the rows that have not arrived.
        y, slope = torch.where(good[:, None], y_new, y), torch.where(good[:, None], slopes[-1], slope)
        t, there = torch.where(good, ahead, t), good & last
        result[rows[there]] = y[there]
        rows, t, h, y, slope, shrinks = (kept[~there] for kept in (rows, t, h, y, slope, shrinks))
    return result, evaluations


def _first_step(
    field: Field, t: Tensor, y: Tensor, slope: Tensor, rows: Tensor, length: float, rtol: float, atol: float
) -> Tensor:
    """A step of about the tolerance, from the size of y, its slope, and its bend over a trial step.  [B]"""
    scale = atol + rtol * y.abs()
    size, speed = _rms(y / scale), _rms(slope / scale)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=length)
    bend = _rms((field(t + trial, y + trial[:, None] * slope, rows) - slope) / scale) / trial
    steepest = torch.maximum(speed, bend)
    step = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * trial, step).clamp(max=length)


def _combined(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), torch.zeros_like(slopes[0]))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()
