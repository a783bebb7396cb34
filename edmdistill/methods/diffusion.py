"""Diffusion training in TrigFlow: how a teacher is made.

Karras et al. 2022 (EDM), with Lu & Song 2025 (sCM), eq. 4: sigma_d F learns the velocity. EDM's loss weight is 1 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import diffuse, sigma_to_time, velocity


class DiffusionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(description="mean of ln(sigma)")] = -1.2
    P_std: Annotated[float, Meta(gt=0, description="standard deviation of ln(sigma)")] = 1.2


class Diffusion(Method):
    Config = DiffusionConfig
    roles = {"teacher": Role(trained=True)}
    product = "teacher"

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = cast(DiffusionConfig, config)
        self.noise = noise
        self.teacher = networks["teacher"]

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("teacher", self.velocity_loss),)

    def velocity_loss(self, batch: Batch, draws: Draws) -> Loss:
        """|| F(x_t, t) - v / sigma_d ||^2, ln sigma ~ N(P_mean, P_std^2).  Source: EDM, eq. 2 and 8; sCM, eq. 4."""
        sigma_data = self.noise.sigma_data
        sigma = lognormal_sigmas(draws, P_mean=self.config.P_mean, P_std=self.config.P_std)
        t = sigma_to_time(sigma, sigma_data)
        z = draws.normal_like(batch.x0, sigma_data)
        F = self.teacher(diffuse(batch.x0, z, t), t, batch.labels)
        return Loss((F - velocity(batch.x0, z, t) / sigma_data).square().flatten(1).sum(1), t)
