"""aVSD: adaptive variational score distillation, a one-step generator trained from the teacher alone.

Lu & Song 2025 (ICLR), appendix C, after Wang et al. 2023 (VSD) and Yin et al. 2024 (DMD).

    g   = f_theta(z', t_max)           one step from noise
    x_t = cos(t) g + sin(t) z
    F_phi(x_t, t) -> v / sigma_d       the auxiliary score tracks the generator's distribution
    g -> g - (F* - F_phi)(x_t, t)      the generator follows the score gap, weighted over t by e^-u(t)
"""

from __future__ import annotations

import msgspec

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, NoiseRange, Role, Sampling
from edmdistill.methods.guidance import GuidanceRange, GuideKind, check_range
from edmdistill.methods.score_distillation import (
    AuxiliaryMean,
    AuxiliaryStd,
    AuxiliaryTurns,
    ScoreDistillation,
    ScoreMean,
    ScoreStd,
    VariationalMethod,
)


class VSDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: sCM, table 4."""

    vsd_P_mean: ScoreMean = 0.4
    vsd_P_std: ScoreStd = 2.0
    aux_P_mean: AuxiliaryMean = -0.8
    aux_P_std: AuxiliaryStd = 1.6
    auxiliary_turns: AuxiliaryTurns = 1
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"

    def __post_init__(self) -> None:
        check_range(self)


class VSD(VariationalMethod[VSDConfig], ScoreDistillation[VSDConfig]):
    Config = VSDConfig
    roles = {
        "teacher": Role(trained=False),
        "generator": Role(trained=True, logvars=1),
        "auxiliary": Role(trained=True, logvars=1),
    }

    @classmethod
    def sampling(cls, config: VSDConfig) -> Sampling:
        return Sampling(steps=1)

    @classmethod
    def schedule(cls, config: VSDConfig, noise: NoiseRange) -> tuple[float, ...]:
        return (noise.sigma_max,)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        return self.vsd_loss(batch, draws)
