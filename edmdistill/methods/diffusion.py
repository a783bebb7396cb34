"""Diffusion training in TrigFlow: how a teacher is made.

Karras et al. 2022 (EDM), with Lu & Song 2025 (sCM), eq. 4: sigma_d F learns the velocity. EDM's loss weight is 1 here.
Given a teacher, training goes on from it: so one that `convert --time-embedding positional` has changed comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.weighting import adaptive
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import diffuse, sigma_to_time, velocity


class DiffusionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.2
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.2
    weighting: Annotated[
        Literal["none", "adaptive"], Meta(description="adaptive: every noise level at the same size of loss, as learnt")
    ] = "none"


class Diffusion(Method):
    Config = DiffusionConfig
    roles = {"teacher": Role(trained=True, logvars=1)}
    product = "teacher"

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = cast(DiffusionConfig, config)
        self.noise = noise
        self.teacher = networks["teacher"]

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("teacher", self.velocity_loss),)

    def velocity_loss(self, batch: Batch, draws: Draws) -> Loss:
        """L = || F(x_t, t) - v / sigma_d ||^2, ln sigma ~ N(P_mean, P_std^2);  adaptive: e^-u(t) L / D + u(t).

        Source: EDM, eq. 2 and 8; sCM, eq. 4 and 25, appendix D with w = -u.
        """
        sigma_data = self.noise.sigma_data
        sigma = lognormal_sigmas(draws, P_mean=self.config.P_mean, P_std=self.config.P_std)
        t = sigma_to_time(sigma, sigma_data)
        z = draws.normal_like(batch.x0, sigma_data)
        x_t, target = diffuse(batch.x0, z, t), velocity(batch.x0, z, t) / sigma_data
        if self.config.weighting == "none":
            F = self.teacher(x_t, t, batch.labels)
            return Loss((F - target).square().flatten(1).sum(1), t)
        F, u = self.teacher(x_t, t, batch.labels, u_at=(t,))
        error = F - target
        return Loss(adaptive(error, u), t, {"velocity_error": error.detach().square().mean()})
