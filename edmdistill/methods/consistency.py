"""What the continuous- and discrete-time consistency methods share: the target and the loss of sCM.

A consistency function takes a point of a trajectory to where the trajectory is at time s, the data for s = 0:

    f(x_t, t) = cos(d) x_t - sin(d) sigma_d F(x_t, t),    d = t - s

It is true if df/dt = 0 along dx_t/dt. Training moves F against cos(d) df/dt, which is

    g = -cos(d)^2 (sigma_d F - dx_t/dt) - r cos(d) sin(d) (x_t + sigma_d dF/dt)

with r = 1; r rises from 0 at the start, for the second term is the unstable one.

Source: Lu & Song 2025 (sCM), eq. 6 and 8, algorithm 1, where s is 0 and d is t; Heek et al. 2024 for s > 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from edmdistill.methods.base import FlowFunction, Loss
from edmdistill.methods.weighting import adaptive
from edmdistill.trigflow import cos_sin, ddim_step


def warmup(images: int, warmup_images: int) -> float:
    """r: from 0 to 1 over the first images.  Source: sCM, section 4.2; 10,000 steps there."""
    return 1.0 if images >= warmup_images else images / warmup_images


def exact_tangent(
    network: FlowFunction, x_t: Tensor, t: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """F and its derivative along (dx, dt), by Duals."""
    return network.tangent(x_t, t, labels, dx, dt)


def finite_difference(
    network: FlowFunction, x_t: Tensor, t: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor, h: float = 5e-3
) -> tuple[Tensor, Tensor]:
    """F and its derivative along (dx, dt) from F at two neighbours, without gradient: three passes, an error of h^2.

    In half precision the neighbours' own errors, divided by h, are larger than the derivative: take it in fp32 only.
    """

    def F(step: float) -> Tensor:
        with torch.no_grad():  # so all of them have the dropout of the next pass
            return network(x_t + step * dx, t + step * dt, labels)

    return F(0.0), (F(h) - F(-h)) / (2 * h)


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
    """F^- and g = cos(t) Delta, where Delta stands for df/dt: f's change over a step of the teacher, by its length.

    Delta = -cos(t') (sigma_d F - dx/dt)
            - r sin(t') (x_t + sigma_d (cos(t - t') F - F') / sin(t - t')),    F' at x_t' and t'

    Args:
        t_before: t' < t, where the teacher's DDIM step leads.  [B]
        dx: dx_t/dt, of the teacher.  [B,C,H,W]
    Source: sCM, eq. 37 and 39, algorithm 2.
    """

    def F(x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():  # so both have the dropout of the next pass
            return network(x, time, labels)

    F_minus = F(x_t, t)
    F_before = F(ddim_step(x_t, dx / sigma_data, t, t_before, sigma_data), t_before)
    (cos, _), (cos_before, sin_before) = cos_sin(t, x_t), cos_sin(t_before, x_t)
    cos_step, sin_step = cos_sin(t - t_before, x_t)
    slope = (cos_step * F_minus - F_before) / sin_step
    Delta = -cos_before * (sigma_data * F_minus - dx) - r * sin_before * (x_t + sigma_data * slope)
    return F_minus, cos * Delta


TANGENTS = {"exact": exact_tangent, "finite-difference": finite_difference}


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
    """F^- and g, both without gradient.

    The derivative is taken along cos(d) sin(d) (dx_t/dt, 1), not along the trajectory itself, whose dF/dt is boundless.

    Args:
        dx: dx_t/dt, of the teacher or of the data.  [B,C,H,W]
        d: t - s, in [0, pi/2].  [B]
        r: see `warmup`.
        tangent: of TANGENTS.
    Source: sCM, section 5.1, "JVP rearrangement".
    """
    cos, sin = cos_sin(d, x_t)
    F, dF = TANGENTS[tangent](network, x_t, t, labels, cos * sin * dx, d.cos() * d.sin())
    return F, -(cos**2) * (sigma_data * F - dx) - r * (cos * sin * x_t + sigma_data * dF)


TangentNormalization = Literal["rms", "norm", "clip"]


def normalized_tangent(g: Tensor, c: float, how: TangentNormalization) -> Tensor:
    """g / (|g| + c), of each sample; or g within [-1, 1].

    Args:
        how: "rms": |g| is the root mean square; "norm": the Euclidean norm, as the paper writes it; "clip".
    Source: sCM, section 4.2.  Differs: with the norm, c = 0.1 is 1% of an average pixel's g at 64 numbers an image and
        0.08% at 16384, as good as none; with the root mean square it is a tenth at any size, so that is the default.
    """
    if how == "clip":
        return g.clamp(-1, 1)
    size: Tensor = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
    return g / (size * (g[0].numel() ** -0.5 if how == "rms" else 1.0) + c)


def consistency_loss(F: Tensor, F_minus: Tensor, g: Tensor, u: Tensor, t: Tensor) -> Loss:
    """e^-u / D |F - F^- - g|^2 + u: its gradient in F is that of -F . g, and u(t) evens out the times.

    Args:
        F, u: with gradient; u is the logarithm of the expected square.  [B,C,H,W] and [B]
        F_minus, g: without.  [B,C,H,W]
        t: for the monitors.  [B]
    Source: sCM, eq. 8, with w = -u; appendix D.
    """
    with torch.no_grad():
        signals = {"tangent_rms": g.square().mean().sqrt()}
    return Loss(adaptive(F - F_minus - g, u), t, signals)
