"""SiD: score identity distillation, a generator of one step, from the teacher alone.

Zhou et al. 2024 (ICML), algorithm 1: CoSIM's losses with one starting level and an auxiliary score that knows one time.

    g   = G_phi(sigma_init n, sigma_init)
    x_s = cos(s) g + sin(s) z
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.semi_implicit import auxiliary_loss, generator_loss
from edmdistill.schedules import edm_curve, lognormal_sigmas
from edmdistill.trigflow import cos_sin, denoised, diffuse, sigma_to_time, velocity


class SiDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alpha: Annotated[float, Meta(gt=0, description="weight of the squared score gap in the generator's loss")] = 1.2
    coef: Annotated[float, Meta(ge=0.5, description="pull of the auxiliary score towards the teacher; .5 = none")] = 0.5
    sigma_init: Annotated[float, Meta(gt=0, description="noise level that the generator starts from")] = 2.5
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma) in the auxiliary score's turn")] = -1.2
    P_std: Annotated[
        float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) in the auxiliary score's turn")
    ] = 1.2
    r_s_max: Annotated[float, Meta(gt=0, le=1, description="end of s on EDM's curve in the generator's turn")] = 0.8
    weight: Annotated[Literal["sid", "c_out"], Meta(description="weight of the generator's loss over s")] = "sid"


class SiD(Method):
    Config = SiDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True), "auxiliary": Role(trained=True)}

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = cast(SiDConfig, config)
        self.noise = noise
        self.teacher, self.generator, self.auxiliary = (networks[role] for role in self.roles)

    def turns(self) -> tuple[Turn, ...]:
        return Turn("auxiliary", self.auxiliary_loss), Turn("generator", self.generator_loss)

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Denoising score matching on generated images.  Source: SiD, eq. 8 (coef .5).

        Differs: their augmentation of generated images is not built.
        """
        sigma_data, beta = self.noise.sigma_data, 1 / (2 * self.config.coef)
        with torch.no_grad():
            s = sigma_to_time(
                lognormal_sigmas(draws, P_mean=self.config.P_mean, P_std=self.config.P_std),
                sigma_data,
            )
            x_s, v = self.transition(self.generate(batch, draws), s, draws)
            F_teacher = self.teacher(x_s, s, batch.labels) if beta < 1 else 0.0
        F_aux = self.auxiliary(x_s, s, batch.labels)
        return auxiliary_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, beta=beta)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Source: SiD, eq. 23."""
        sigma_data, sigma_min, sigma_max = self.noise
        r_s = draws.uniform() * self.config.r_s_max
        s = sigma_to_time(edm_curve(r_s, sigma_min, sigma_max), sigma_data)
        g = self.generate(batch, draws)
        x_s, v = self.transition(g, s, draws)
        F_teacher = self.teacher(x_s, s, batch.labels)
        F_aux = self.auxiliary(x_s, s, batch.labels)
        loss = generator_loss(
            F_aux, F_teacher, v, s, sigma_data=sigma_data, alpha=self.config.alpha, weight=self.config.weight
        )
        return loss._replace(generated=g.detach())

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """One image for each label; of the data only the shape is used.  [B,C,H,W]"""
        sigma_data = self.noise.sigma_data
        t = sigma_to_time(self.config.sigma_init, sigma_data).expand(len(batch.x0))
        x_t = cos_sin(t, batch.x0)[1] * draws.normal_like(batch.x0, sigma_data)
        return denoised(x_t, self.generator(x_t, t, batch.labels), t, sigma_data)

    def transition(self, g: Tensor, s: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x_s, v): g at noise level s, and the velocity there."""
        z = draws.normal_like(g, self.noise.sigma_data)
        return diffuse(g, z, s), velocity(g, z, s)
