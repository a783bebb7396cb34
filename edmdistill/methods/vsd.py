"""aVSD: adaptive variational score distillation, a generator of one step, from the teacher alone.

Lu & Song 2025 (ICLR), appendix C, after Wang et al. 2023 (VSD) and Yin et al. 2024 (DMD).

    g   = f_theta(z', t_max)           one step from noise
    x_t = cos(t) g + sin(t) z
    F_phi(x_t, t) -> v / sigma_d       the auxiliary score follows the generator's images
    g -> g - (F* - F_phi)(x_t, t)      and the generator goes where the teacher's differs, weighed over t by e^-u(t)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.score_distillation import auxiliary_loss, generator_loss
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import sigma_to_time


class VSDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: sCM, table 4."""

    vsd_P_mean: Annotated[
        float, Meta(ge=-20, le=20, description="mean of ln(sigma) where the two scores are compared")
    ] = 0.4
    vsd_P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) there")] = 2.0
    aux_P_mean: Annotated[
        float, Meta(ge=-20, le=20, description="mean of ln(sigma) in the auxiliary score's turn")
    ] = -0.8
    aux_P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) in that turn")] = 1.6


class VSD(Method):
    Config = VSDConfig
    roles = {
        "teacher": Role(trained=False),
        "generator": Role(trained=True, logvars=1),
        "auxiliary": Role(trained=True, logvars=1),
    }

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = cast(VSDConfig, config)
        self.noise = noise
        self.teacher, self.generator, self.auxiliary = (networks[role] for role in self.roles)

    def turns(self) -> tuple[Turn, ...]:
        return Turn("auxiliary", self.auxiliary_loss), Turn("generator", self.generator_loss)

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """L_Diff(phi): the auxiliary score follows the generator."""
        own, noise = self.config, self.noise
        t = sigma_to_time(lognormal_sigmas(draws, P_mean=own.aux_P_mean, P_std=own.aux_P_std), noise.sigma_data)
        return auxiliary_loss(self.auxiliary, self.generator, batch, t, draws, noise)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """L_VSD(theta, psi): the generator follows the gap between the two scores."""
        own, noise = self.config, self.noise
        t = sigma_to_time(lognormal_sigmas(draws, P_mean=own.vsd_P_mean, P_std=own.vsd_P_std), noise.sigma_data)
        return generator_loss(self.generator, self.teacher, self.auxiliary, batch, t, draws, noise)
