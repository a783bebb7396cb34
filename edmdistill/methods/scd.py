"""sCD: continuous-time consistency models, distilled from a teacher.

Lu & Song 2025 (ICLR), algorithm 1, whose trajectory is the teacher's; optionally with variational score distillation
of a single step, L_CM(theta) + vsd L_VSD(theta, psi) (sCD + VSD, section 5.2).

rCM (Zheng et al. 2025) has the same two parts. Differs: its losses are not weighted over t, its score sees images of
one to four steps, and only after the tangent's warm-up; docs/methods.md compares the two.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.adversarial import gan_roles
from edmdistill.methods.base import Batch, Loss, Role, Turn
from edmdistill.methods.guidance import GuidanceRange, GuideKind, check_range, guided_roles
from edmdistill.methods.scm import SCM, SCMConfig
from edmdistill.methods.score_distillation import (
    AuxiliaryMean,
    AuxiliaryStd,
    AuxiliaryTurns,
    ScoreMean,
    ScoreStd,
    VariationalMethod,
)


class SCDConfig(SCMConfig, frozen=True, forbid_unknown_fields=True):
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"
    vsd: Annotated[float, Meta(ge=0, description="weight of variational score distillation's loss; 0 = none")] = 0.0
    vsd_P_mean: ScoreMean = 0.4
    vsd_P_std: ScoreStd = 2.0
    aux_P_mean: AuxiliaryMean = -0.8
    aux_P_std: AuxiliaryStd = 1.6
    auxiliary_turns: AuxiliaryTurns = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self)
        if not self.vsd:
            names = "vsd_P_mean", "vsd_P_std", "aux_P_mean", "aux_P_std", "auxiliary_turns"
            refuse_idle(self, names, "vsd = 0", "set vsd above 0")
        if self.vsd and self.intervals > 1:
            raise ValueError(
                f"vsd distills a single step from noise to data, but intervals = {self.intervals} needs as many steps: "
                "leave one of them at its default"
            )


class SCD(SCM[SCDConfig], VariationalMethod[SCDConfig]):
    Config = SCDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True, logvars=1)}

    @classmethod
    def roles_for(cls, config: SCDConfig) -> dict[str, Role]:
        # The two losses differ in size at the same t: each has its own log-variance head.
        vsd_roles = {"generator": Role(trained=True, logvars=2), "auxiliary": Role(trained=True, logvars=1)}
        roles = cls.roles | vsd_roles if config.vsd else cls.roles
        return guided_roles(roles, config) | gan_roles(config)

    def turns(self) -> tuple[Turn, ...]:
        auxiliary = (Turn("auxiliary", self.auxiliary_loss),) if self.config.vsd else ()
        return *auxiliary * self.config.auxiliary_turns, *super().turns()

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L_CM(theta) + vsd L_VSD(theta, psi).  Source: section 5.2; appendix C.2."""
        loss = super().generator_loss(batch, draws)
        if not self.config.vsd:
            return loss
        return loss.plus(self.vsd_loss(batch, draws, logvars=2), self.config.vsd)

    def guidance_weights(self, draws: Draws) -> Tensor | None:
        return self.teacher.weights(draws)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns sigma_d F*(x_t, t), guided."""
        return self.noise.sigma_data * self.teacher(x_t, t, labels, w=w)
