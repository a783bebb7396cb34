"""dsCD: discrete-time consistency distillation with sCM's objective, over N intervals of EDM's noise levels.

Lu & Song 2025 (ICLR), algorithm 2 and appendix E. It takes no derivative: the teacher steps from t to the level before
it, and the generator is asked to say the same at both ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, cast

import msgspec
import torch
from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.consistency import (
    TangentNormalization,
    consistency_loss,
    discrete_target,
    normalized_tangent,
    warmup,
)
from edmdistill.methods.guidance import (
    Guide,
    GuidedTeacher,
    Range,
    at_weight,
    check_guidance,
    guided_roles,
    require_range,
)
from edmdistill.schedules import edm_curve, lognormal_shares
from edmdistill.trigflow import denoised, diffuse, sigma_to_time


class DSCDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    intervals: Annotated[int, Meta(ge=2, le=100_000, description="N: intervals of EDM's noise levels")] = 1024
    P_mean: Annotated[
        float, Meta(ge=-20, le=20, description="mean of ln(sigma), whose law is split among the levels")
    ] = -1.0
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.4
    warmup_images: Annotated[int, Meta(ge=0, description="images over which the tangent's unstable term rises")] = 0
    tangent_normalization: Annotated[TangentNormalization, Meta(description="how the tangent is kept small")] = "rms"
    c: Annotated[float, Meta(ge=0, description="what is added to the tangent's size before it divides")] = 0.1
    guidance: Range = (1.0, 1.0)
    guide: Guide = "classes"

    def __post_init__(self) -> None:
        require_range(self)


class DSCD(Method):
    Config = DSCDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True, logvars=1)}

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = own = cast(DSCDConfig, config)
        self.noise = noise
        self.teacher, self.generator = GuidedTeacher(networks, own), networks["generator"]
        sigma_data, sigma_min, sigma_max = noise
        sigmas = edm_curve(torch.arange(1, own.intervals + 1) / own.intervals, sigma_min, sigma_max)
        self.times = torch.cat([torch.zeros(1, dtype=torch.float64), sigma_to_time(sigmas, sigma_data)])
        self.shares = lognormal_shares(sigmas, P_mean=own.P_mean, P_std=own.P_std)

    @classmethod
    def roles_for(cls, config: msgspec.Struct) -> dict[str, Role]:
        return guided_roles(cls.roles, cast(DSCDConfig, config))

    @classmethod
    def check_teacher(
        cls, config: msgspec.Struct, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        return check_guidance(cast(DSCDConfig, config), label_dim, label_dropout)

    @classmethod
    def guidance(cls, config: msgspec.Struct) -> tuple[float, float]:
        return cast(DSCDConfig, config).guidance

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.generator_loss),)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2."""
        own, sigma_data = self.config, self.noise.sigma_data
        # Level i >= 1 with its share; t_0 = 0 is only stepped to.
        level = torch.searchsorted(self.shares.cumsum(0).to(batch.x0.device), draws.uniform()).clamp(
            max=own.intervals - 1
        )
        times = self.times.to(batch.x0.device)
        t_before, t = times[level], times[level + 1]
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
        w = self.teacher.weights(draws)
        generator = at_weight(self.generator, w)
        with torch.no_grad():
            dx = sigma_data * self.teacher(x_t, t, batch.labels, w)
            r = warmup(batch.images, own.warmup_images)
            F_minus, g = discrete_target(generator, x_t, t, t_before, batch.labels, dx, r=r, sigma_data=sigma_data)
        F, u = generator(x_t, t, batch.labels, u_at=(t,))
        loss = consistency_loss(F, F_minus, normalized_tangent(g, own.c, own.tangent_normalization), u, t)
        return loss._replace(generated=denoised(x_t, F_minus, t, sigma_data))
