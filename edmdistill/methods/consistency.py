"""Consistency training in TrigFlow, shared by sCT, sCD and dsCD: targets and loss of sCM.

A consistency function maps a point of a trajectory to its point at time s (s = 0: the data),

    f(x_t, t) = cos(d) x_t - sin(d) sigma_d F(x_t, t),    d = t - s

It is exact if df/dt = 0 along the trajectory dx_t/dt. Training moves F along the tangent g = cos(d) df/dt,

    g = -cos(d)^2 (sigma_d F - dx_t/dt) - r cos(d) sin(d) (x_t + sigma_d dF/dt)

with r = 1. The second term is the unstable one, so r is warmed up from 0.

Source: Lu & Song 2025 (sCM), eq. 6 and 8, algorithm 1, where s = 0 and d = t; Heek et al. 2024 for s > 0.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.methods.base import FlowFunction, Loss
from edmdistill.methods.tangents import TANGENTS, TangentNormalization
from edmdistill.methods.weighting import adaptive
from edmdistill.trigflow import cos_sin, ddim_step


class ConsistencyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of every sCM method."""

    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.0
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.4
    warmup_images: Annotated[
        int, Meta(ge=0, description="images over which the tangent's unstable term is warmed up")
    ] = 0
    tangent_normalization: Annotated[TangentNormalization, Meta(description="how the tangent is normalized")] = "rms"
    c: Annotated[float, Meta(ge=0, description="constant added to the tangent's norm before dividing by it")] = 0.1


def continuous_target(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    *,
    d: Tensor,
    r: float,
    sigma_data: float,
    tangent: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Returns F^- and g, both without gradient.  [B,C,H,W] each

    The derivative is taken along cos(d) sin(d) (dx_t/dt, 1), since dF/dt itself is unbounded.

    Args:
        dx: dx_t/dt of the teacher or of the data.  [B,C,H,W]
        d: t - s, in [0, pi/2].  [B]
        r: see `tangent_warmup`.
        tangent: a key of TANGENTS.
    Source: sCM, section 5.1, "JVP rearrangement".
    """
    cos, sin = cos_sin(d, x_t)
    F, dF = TANGENTS[tangent](network, x_t, t, labels, cos * sin * dx, d.cos() * d.sin())
    return F, -(cos**2) * (sigma_data * F - dx) - r * (cos * sin * x_t + sigma_data * dF)


def discrete_target(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    t_before: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    *,
    r: float,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """Returns F^- and g = cos(t) Delta, both without gradient; Delta is a difference quotient in place of df/dt.

    Delta = -cos(t') (sigma_d F - dx/dt)
            - r sin(t') (x_t + sigma_d (cos(t - t') F - F') / sin(t - t')),    F' = F(x_t', t')

    Args:
        t_before: t' < t, the end of the teacher's DDIM step.  [B]
        dx: dx_t/dt of the teacher.  [B,C,H,W]
        r: see `tangent_warmup`.
    Source: sCM, eq. 37 and 39, algorithm 2.
    """

    def F(x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():  # so that both share the dropout of the next pass
            return network(x, time, labels)

    F_minus = F(x_t, t)
    F_before = F(ddim_step(x_t, dx / sigma_data, t, t_before, sigma_data), t_before)
    (cos, _), (cos_before, sin_before) = cos_sin(t, x_t), cos_sin(t_before, x_t)
    cos_step, sin_step = cos_sin(t - t_before, x_t)
    slope = (cos_step * F_minus - F_before) / sin_step
    Delta = -cos_before * (sigma_data * F_minus - dx) - r * sin_before * (x_t + sigma_data * slope)
    return F_minus, cos * Delta


def time_in_interval(t: Tensor, intervals: int) -> Tensor:
    """Returns d = t - s, where s is the start of t's interval when [0, pi/2] is divided into M equal ones.  [B]

    Source: sCM, appendix G; Heek et al. 2024 (multistep consistency models).
    """
    length = math.pi / 2 / intervals
    return t - (t / length).floor().clamp(max=intervals - 1) * length


def consistency_loss(F: Tensor, F_minus: Tensor, g: Tensor, u: Tensor, t: Tensor) -> Loss:
    """Returns e^-u / D |F - F^- - g|^2 + u, whose gradient in F is that of -F . g; u(t) balances the times.

    Args:
        F, u: with gradient; u is the learned log variance.  [B,C,H,W] and [B]
        F_minus, g: without gradient.  [B,C,H,W]
        t: time of each sample, for the monitors.  [B]
    Source: sCM, eq. 8, with w = -u; appendix D.
    """
    with torch.no_grad():
        signals = {"tangent_rms": g.square().mean().sqrt()}
    return Loss(adaptive(F - F_minus - g, u), t, signals)
