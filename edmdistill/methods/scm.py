"""sCM: continuous-time consistency models, distilled from a teacher (sCD) or trained on data alone (sCT).

Lu & Song 2025 (ICLR), algorithm 1.

    x_t = cos(t) x0 + sin(t) z              data at noise level t
    dx/dt = sigma_d F*(x_t, t)              the teacher's velocity (sCD), or cos(t) z - sin(t) x0 (sCT)
    g = cos(t) df/dt, normalized            the tangent of the consistency function f
    F <- F^- + g                            regression with weight e^-u(t)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta
from torch import Tensor, no_grad

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.consistency import ConsistencyConfig, consistency_loss, continuous_target, time_in_interval
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range, guided_roles, with_guidance
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import (
    AuxiliaryMean,
    AuxiliaryStd,
    ScoreMean,
    ScoreStd,
    vsd_auxiliary_loss,
    vsd_generator_loss,
)
from edmdistill.methods.tangents import normalized_tangent, tangent_warmup
from edmdistill.schedules import lognormal_times
from edmdistill.trigflow import denoised


class SCTConfig(ConsistencyConfig, frozen=True, forbid_unknown_fields=True):
    tangent: Annotated[
        Literal["exact", "finite-difference"], Meta(description="how the tangent is computed; exact is more accurate")
    ] = "exact"
    intervals: Annotated[
        int, Meta(ge=1, le=100_000, description="M: consistency to the start of each of M intervals of t")
    ] = 1
    allow_edm_time: Annotated[bool, Meta(description="allow a teacher whose time input is ln(sigma), not t")] = False


class SCDConfig(SCTConfig, frozen=True, forbid_unknown_fields=True):
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"
    vsd: Annotated[float, Meta(ge=0, description="weight of variational score distillation's loss; 0 = none")] = 0.0
    vsd_P_mean: ScoreMean = 0.4
    vsd_P_std: ScoreStd = 2.0
    aux_P_mean: AuxiliaryMean = -0.8
    aux_P_std: AuxiliaryStd = 1.6

    def __post_init__(self) -> None:
        check_range(self)
        if self.vsd and self.intervals > 1:
            raise ValueError(
                f"vsd distils a single step from noise to data, but intervals = {self.intervals} needs as many steps: "
                "leave one of them at its default"
            )


ConfigT = TypeVar("ConfigT", bound=SCTConfig)


class ContinuousConsistency(Method[ConfigT]):
    """sCM with a trajectory that is left open."""

    def __init__(self, config: ConfigT, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator = networks["generator"]

    @classmethod
    def check_teacher(
        cls, config: ConfigT, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        """Source: sCM, section 4.1: the derivative of EDM's time embedding makes training unstable."""
        if positional_time or config.allow_edm_time:
            return super().check_teacher(
                config, positional_time=positional_time, label_dim=label_dim, label_dropout=label_dropout
            )
        return (
            "the teacher's time input is ln(sigma), whose embedding makes continuous-time training unstable: convert "
            "the teacher with --time-embedding positional and fine-tune it with `edmdistill train diffusion`, or use "
            "--set method.allow_edm_time=true"
        )

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.generator_loss),)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 1.  Source: eq. 8."""
        config, sigma_data = self.config, self.noise.sigma_data
        t = lognormal_times(draws, sigma_data, P_mean=config.P_mean, P_std=config.P_std)
        x_t, v = noised(batch.x0, t, draws, sigma_data)
        w = self.guidance_weights(draws)
        generator = with_guidance(self.generator, w)
        with no_grad():
            F_minus, g = continuous_target(
                generator,
                x_t,
                t,
                batch.labels,
                self.velocity(x_t, t, batch.labels, v, w),
                d=time_in_interval(t, config.intervals),
                r=tangent_warmup(batch.images, config.warmup_images),
                sigma_data=sigma_data,
                tangent=config.tangent,
            )
            g = normalized_tangent(g, config.c, config.tangent_normalization)
        F, u = generator(x_t, t, batch.labels, u_at=(t,))
        loss = consistency_loss(F, F_minus, g, u, t)
        return loss._replace(generated=denoised(x_t, F_minus, t, sigma_data))

    def guidance_weights(self, draws: Draws) -> Tensor | None:
        """Draws the guidance weight of each sample; None if it is fixed.  [B]"""
        return None

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns dx_t/dt along the trajectory; v is that of the data and its noise.  [B,C,H,W]"""


class SCT(ContinuousConsistency[SCTConfig]):
    """Without a teacher: the velocity is that of the data and its noise."""

    Config = SCTConfig
    roles = {"generator": Role(trained=True, logvars=1)}

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        return v


class SCD(ContinuousConsistency[SCDConfig], GuidedMethod[SCDConfig]):
    """With a teacher, whose velocity is used; optionally with score distillation of one step (sCD + VSD)."""

    Config = SCDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True, logvars=1)}

    @classmethod
    def roles_for(cls, config: SCDConfig) -> dict[str, Role]:
        # The two losses differ in size at the same t: each has its own log-variance head.
        vsd_roles = {"generator": Role(trained=True, logvars=2), "auxiliary": Role(trained=True, logvars=1)}
        return guided_roles(cls.roles | vsd_roles if config.vsd else cls.roles, config)

    def turns(self) -> tuple[Turn, ...]:
        auxiliary = (Turn("auxiliary", self.auxiliary_loss),) if self.config.vsd else ()
        return *auxiliary, *super().turns()

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L_Diff(phi).  Source: appendix C.2."""
        config, noise = self.config, self.noise
        t = lognormal_times(draws, noise.sigma_data, P_mean=config.aux_P_mean, P_std=config.aux_P_std)
        w = self.guidance_weights(draws)
        auxiliary, generator = (with_guidance(self.networks[role], w) for role in ("auxiliary", "generator"))
        return vsd_auxiliary_loss(auxiliary, generator, batch, t, draws, noise)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L_CM(theta) + vsd L_VSD(theta, psi).  Source: section 5.2; appendix C.2."""
        config, noise, loss = self.config, self.noise, super().generator_loss(batch, draws)
        if not config.vsd:
            return loss
        t = lognormal_times(draws, noise.sigma_data, P_mean=config.vsd_P_mean, P_std=config.vsd_P_std)
        w = self.guidance_weights(draws)
        auxiliary, generator = (with_guidance(self.networks[role], w) for role in ("auxiliary", "generator"))
        teacher = partial(self.teacher, w=w)
        vsd = vsd_generator_loss(generator, teacher, auxiliary, batch, t, draws, noise, logvars=2)
        return loss._replace(value=loss.value + config.vsd * vsd.value, signals=loss.signals | vsd.signals)

    def guidance_weights(self, draws: Draws) -> Tensor | None:
        return self.teacher.weights(draws)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns sigma_d F*(x_t, t), guided."""
        return self.noise.sigma_data * self.teacher(x_t, t, labels, w=w)
