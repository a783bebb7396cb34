"""Consistency training in TrigFlow, shared by sCT, sCD and dsCD: the options, the tangent and the loss of sCM.

A consistency function maps a point of a trajectory to its point at time s (s = 0: the data),

    f(x_t, t) = cos(d) x_t - sin(d) sigma_d F(x_t, t),    d = t - s

It is exact if df/dt = 0 along the trajectory dx_t/dt. Training moves F along the tangent g = cos(d) df/dt,

    g = -cos(d)^2 (sigma_d F - dx_t/dt) - r cos(d) sin(d) (x_t + sigma_d dF/dt)

with r = 1. The second term is the unstable one, so r is warmed up from 0.

Source: Lu & Song 2025 (sCM), eq. 6 and 8, algorithm 1, where s = 0 and d = t; Heek et al. 2024 for s > 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.methods.adversarial import GANConfig
from edmdistill.methods.base import Loss
from edmdistill.methods.weighting import adaptive, mean_rms

TangentNormalization = Literal["rms", "norm", "power", "clip", "raw"]
Weighting = Literal["adaptive", "none"]


class ConsistencyConfig(GANConfig, frozen=True, forbid_unknown_fields=True):
    """Options of every sCM method."""

    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.0
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.4
    warmup_images: Annotated[
        int, Meta(ge=0, description="images over which the tangent's unstable term is warmed up")
    ] = 0
    tangent_normalization: Annotated[TangentNormalization, Meta(description="how the tangent is normalized")] = "rms"
    c: Annotated[float, Meta(ge=0, description="constant added to the tangent's norm before dividing by it")] = 0.1
    power: Annotated[float, Meta(ge=0, le=1, description="power of |tangent|^2 + c, to divide by")] = 0.75
    weighting: Annotated[Weighting, Meta(description="adaptive: a learned weight that balances the noise levels")] = (
        "adaptive"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tangent_normalization in ("clip", "raw"):
            where = f'tangent_normalization = "{self.tangent_normalization}"'
            refuse_idle(self, ("c",), where, 'set tangent_normalization = "rms", "norm" or "power"')
        if self.tangent_normalization != "power":
            where = f'tangent_normalization = "{self.tangent_normalization}"'
            refuse_idle(self, ("power",), where, 'set tangent_normalization = "power"')


def normalized_tangent(g: Tensor, c: float, normalization: TangentNormalization, power: float = 0.75) -> Tensor:
    """Returns g / (|g| + c) for each sample, g / (|g|^2 + c)^power, g clamped to [-1, 1], or g itself.  [B,C,H,W]

    Args:
        normalization: "rms": |g| is the root mean square; "norm": the Euclidean norm, as in the paper; "power": of the
            Euclidean norm; "clip"; "raw".
    Source: sCM, section 4.2; of "power", MeanFlow, section 4.3: the gradient of its weighted squared error.
    Differs: the default is the root mean square, for which c = 0.1 means the same at any resolution. By the norm it is
        1% of an average pixel's g at 64 values an image, but 0.08% at 16384.
    """
    if normalization in ("clip", "raw"):
        return g.clamp(-1, 1) if normalization == "clip" else g
    size: Tensor = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
    if normalization == "power":
        return g / (size.square() + c) ** power
    return g / (size * (g[0].numel() ** -0.5 if normalization == "rms" else 1.0) + c)


def tangent_warmup(images: int, warmup_images: int, r_max: float = 1.0) -> float:
    """Returns r, which rises linearly from 0 toward 1 over the first images, and ends at r_max.

    Source: sCM, section 4.2; 10,000 steps.
    """
    return r_max if images >= warmup_images else min(r_max, images / warmup_images)


def consistency_loss(F: Tensor, g: Tensor, u: Tensor, t: Tensor, weighting: Weighting = "adaptive") -> Loss:
    """Returns e^-u / D |F - F^- - g|^2 + u, whose gradient in F is that of -F . g; u(t) balances the times.

    F^- is F as a number, without its gradient.

    Args:
        F, u: with gradient; u is the learned log variance.  [B,C,H,W] and [B]
        g: without gradient.  [B,C,H,W]
        t: time of each sample, for the monitors.  [B]
        weighting: "none": u is 0.
    Source: sCM, eq. 8, with w = -u; appendix D.
    """
    return Loss(adaptive(F - F.detach() - g, u if weighting == "adaptive" else torch.zeros_like(u)), t)


def tangent_loss(F: Tensor, g: Tensor, u: Tensor, t: Tensor, config: ConsistencyConfig) -> Loss:
    """Returns consistency_loss of the tangent g, normalized as the options say, and the size that g had as a signal."""
    normalized = normalized_tangent(g, config.c, config.tangent_normalization, config.power)
    loss = consistency_loss(F, normalized, u, t, config.weighting)
    return loss._replace(signals={"tangent_rms": mean_rms(g)})
