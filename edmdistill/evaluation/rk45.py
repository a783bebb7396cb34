"""Dormand and Prince's Runge-Kutta method of order 5(4), with a step size for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.integrate import RK45
from torch import Tensor

from edmdistill.errors import EdmDistillError

NODES, STAGES, FIFTH, ERROR = (coefficients.tolist() for coefficients in (RK45.C, RK45.A, RK45.B, RK45.E))
"""Dormand and Prince's: c [6], a [6,5], b [6], and the fourth order's b minus the fifth's [7]."""

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [b], state [b,n], which rows of the batch these are [b]) -> the state's derivative [b,n]"""


def rk45(field: Field, state: Tensor, start: float, end: float, *, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
    """Solves dy/dt = field(t, y) from start to end, each row in steps of its own.

    A row's steps depend on that row alone, so its result does not depend on the batch if the field does not. Rows that
    have reached the end are not evaluated again.

    scipy's solve_ivp, called for one row after another, takes 5.1 times as long (likelihoods of 32 digits on one CPU
    core; `benchmarks/bench.py --only likelihood` compares on fewer), because the network then sees one image at a
    time. Called for the batch as one state, it takes 0.49 of the time, but the result of an image then depends on the
    others.

    Args:
        state: y at the start.  [B,n] float64
        end: greater than start.
        rtol, atol: a step is accepted if the rms over its row of error / (atol + rtol max(|y|, |y_new|)) is below 1.
    Returns: y at the end [B,n], and the evaluations of the field that each row took, int64 [B].
    Raises: EdmDistillError: a step would be shorter than the resolution of time.
    Source: Dormand & Prince 1980; Hairer, Norsett & Wanner 1993, section II.4, for step sizes and the first step.
        Differs: nothing, for one row, from scipy's solve_ivp.
    """
    rows = torch.arange(len(state), device=state.device)
    t = state.new_full((len(state),), start)
    y, slope = state, field(t, state, rows)
    h = _first_step(field, t, y, slope, rows, end - start, rtol, atol)
    rejected = torch.zeros_like(rows, dtype=torch.bool)  # rows whose last step was rejected
    result, evaluations = torch.empty_like(state), torch.full_like(rows, 2)
    while len(rows):
        stuck = (h < 10 * t.abs() * torch.finfo(t.dtype).eps) | ~h.isfinite()
        if bool(stuck.any()):
            raise EdmDistillError(
                f"an ODE could not be solved at time {float(t[stuck][0]):.4g}: its steps become too small, or its "
                "slope is not finite; check the network with edmdistill inspect, or use a larger tolerance"
            )
        last = t + h >= end
        ahead = torch.where(last, end, t + h)
        h = ahead - t

        # Six slopes within the step, and the one at its end.
        slopes = [slope]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            slopes.append(field(t + node * h, y + h[:, None] * _combined(weights[: len(slopes)], slopes), rows))
        y_new = y + h[:, None] * _combined(FIFTH, slopes)
        slopes.append(field(ahead, y_new, rows))
        evaluations[rows] += 6

        # Accept or reject the step, and choose the size of the next.
        scale = atol + rtol * torch.maximum(y.abs(), y_new.abs())
        error = _rms(h[:, None] * _combined(ERROR, slopes) / scale)
        accepted = error < 1
        factor = (SAFETY * error**-0.2).clamp(MIN_FACTOR, MAX_FACTOR).nan_to_num(MIN_FACTOR)
        h = h * torch.where(accepted & rejected, factor.clamp(max=1), factor)
        rejected = ~accepted

        # Continue with the rows that have not reached the end.
        y, slope = torch.where(accepted[:, None], y_new, y), torch.where(accepted[:, None], slopes[-1], slope)
        t, done = torch.where(accepted, ahead, t), accepted & last
        result[rows[done]] = y[done]
        rows, t, h, y, slope, rejected = (values[~done] for values in (rows, t, h, y, slope, rejected))
    return result, evaluations


def _first_step(
    field: Field, t: Tensor, y: Tensor, slope: Tensor, rows: Tensor, length: float, rtol: float, atol: float
) -> Tensor:
    """Returns a first step with an error of about the tolerance, from y, its slope and its second derivative.  [B]"""
    scale = atol + rtol * y.abs()
    size, speed = _rms(y / scale), _rms(slope / scale)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=length)
    curvature = _rms((field(t + trial, y + trial[:, None] * slope, rows) - slope) / scale) / trial
    steepest = torch.fmax(speed, curvature)  # where the trial meets no finite slope, by speed alone
    step = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * trial, step).clamp(max=length)


def _combined(weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    return sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), torch.zeros_like(slopes[0]))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()
