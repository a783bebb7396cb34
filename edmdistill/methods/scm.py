"""sCM: continuous-time consistency models, distilled from a teacher (sCD) or trained on data alone (sCT).

Lu & Song 2025 (ICLR), algorithm 1.

    x_t = cos(t) x0 + sin(t) z                 data at noise level t
    dx/dt = sigma_d F*(x_t, t)                 the teacher's velocity (sCD), or cos(t) z - sin(t) x0 (sCT)
    g = cos(t) df/dt, normalized_tangent                    how far the consistency function f is from constant
    F <- F^- + g                               and so it is learnt, weighed over t by e^-u(t)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal, cast

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.consistency import (
    TangentNormalization,
    consistency_loss,
    continuous_target,
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
from edmdistill.methods.score_distillation import auxiliary_loss, generator_loss
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time, velocity


class SCTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.0
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.4
    warmup_images: Annotated[int, Meta(ge=0, description="images over which the tangent's unstable term rises")] = 0
    tangent_normalization: Annotated[TangentNormalization, Meta(description="how the tangent is kept small")] = "rms"
    c: Annotated[float, Meta(ge=0, description="what is added to the tangent's size before it divides")] = 0.1
    tangent: Annotated[
        Literal["exact", "finite-difference"], Meta(description="how the tangent is taken; the second is weaker")
    ] = "exact"
    intervals: Annotated[
        int, Meta(ge=1, le=100_000, description="M: consistency to the start of each of M intervals of t")
    ] = 1
    allow_edm_time: Annotated[bool, Meta(description="allow a teacher that reads ln(sigma) in the place of t")] = False


class SCDConfig(SCTConfig, frozen=True, forbid_unknown_fields=True):
    guidance: Range = (1.0, 1.0)
    guide: Guide = "classes"
    vsd: Annotated[float, Meta(ge=0, description="weight of variational score distillation's loss; 0 = none")] = 0.0
    vsd_P_mean: Annotated[
        float, Meta(ge=-20, le=20, description="mean of ln(sigma) where the two scores are compared")
    ] = 0.4
    vsd_P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) there")] = 2.0
    aux_P_mean: Annotated[
        float, Meta(ge=-20, le=20, description="mean of ln(sigma) in the auxiliary score's turn")
    ] = -0.8
    aux_P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) in that turn")] = 1.6

    def __post_init__(self) -> None:
        require_range(self)
        if self.vsd and self.intervals > 1:
            raise ValueError(
                f"vsd is about one step from noise to the data, but with intervals {self.intervals} it takes as many: "
                "set one of them to its default"
            )


class SCT(Method):
    """Without a teacher: the velocity is that of the data and its noise."""

    Config: ClassVar[type[msgspec.Struct]] = SCTConfig
    roles: ClassVar[dict[str, Role]] = {"generator": Role(trained=True, logvars=1)}

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        self.config = cast(SCTConfig, config)
        self.noise = noise
        self.networks = networks
        self.generator = networks["generator"]

    @classmethod
    def check_teacher(
        cls, config: msgspec.Struct, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        """Source: sCM, section 4.1: the derivative of EDM's time embedding is what makes the training unstable."""
        if positional_time or cast(SCTConfig, config).allow_edm_time:
            return None
        return (
            "the teacher reads ln(sigma), by an embedding whose derivative makes continuous-time training unstable: "
            "convert it with --time-embedding positional, and train that by `edmdistill train diffusion`; or say "
            "--set method.allow_edm_time=true"
        )

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.generator_loss),)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 1.  Source: eq. 8."""
        own, sigma_data = self.config, self.noise.sigma_data
        t = sigma_to_time(lognormal_sigmas(draws, P_mean=own.P_mean, P_std=own.P_std), sigma_data)
        z = draws.normal_like(batch.x0, sigma_data)
        x_t = diffuse(batch.x0, z, t)
        w = self.weights(draws)
        generator = at_weight(self.generator, w)
        with torch.no_grad():
            dx = self.velocity(batch, z, x_t, t, w)
            F_minus, g = continuous_target(
                generator,
                x_t,
                t,
                batch.labels,
                dx,
                d=since_start(t, own.intervals),
                r=warmup(batch.images, own.warmup_images),
                sigma_data=sigma_data,
                tangent=own.tangent,
            )
            g = normalized_tangent(g, own.c, own.tangent_normalization)
        F, u = generator(x_t, t, batch.labels, u_at=(t,))
        loss = consistency_loss(F, F_minus, g, u, t)
        return loss._replace(generated=denoised(x_t, F_minus, t, sigma_data))

    def weights(self, draws: Draws) -> Tensor | None:
        """Of guidance, for each sample one; None: there is no choice of them.  [B]"""
        return None

    def velocity(self, batch: Batch, z: Tensor, x_t: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        """dx_t/dt = cos(t) z - sin(t) x0."""
        return velocity(batch.x0, z, t)


class SCD(SCT):
    """With a teacher: the velocity is the teacher's. If asked, one step is distilled by its score too (sCD + VSD)."""

    Config = SCDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True, logvars=1)}

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.teacher = GuidedTeacher(networks, cast(SCDConfig, config))

    @classmethod
    def roles_for(cls, config: msgspec.Struct) -> dict[str, Role]:
        own = cast(SCDConfig, config)
        # The two losses have sizes of their own at the same t: each has a head for u.
        more = {"generator": Role(trained=True, logvars=2), "auxiliary": Role(trained=True, logvars=1)}
        return guided_roles(cls.roles | more if own.vsd else cls.roles, own)

    @classmethod
    def check_teacher(
        cls, config: msgspec.Struct, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        unstable = super().check_teacher(
            config, positional_time=positional_time, label_dim=label_dim, label_dropout=label_dropout
        )
        return unstable or check_guidance(cast(SCDConfig, config), label_dim, label_dropout)

    @classmethod
    def guidance(cls, config: msgspec.Struct) -> tuple[float, float]:
        return cast(SCDConfig, config).guidance

    def turns(self) -> tuple[Turn, ...]:
        own = cast(SCDConfig, self.config)
        return (Turn("auxiliary", self.auxiliary_loss), *super().turns()) if own.vsd else super().turns()

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """L_Diff(phi).  Source: appendix C.2."""
        own, noise = cast(SCDConfig, self.config), self.noise
        t = sigma_to_time(lognormal_sigmas(draws, P_mean=own.aux_P_mean, P_std=own.aux_P_std), noise.sigma_data)
        w = self.weights(draws)
        auxiliary, generator = (at_weight(network, w) for network in (self.networks["auxiliary"], self.generator))
        return auxiliary_loss(auxiliary, generator, batch, t, draws, noise)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """L_CM(theta) + vsd L_VSD(theta, psi).  Source: section 5.2; appendix C.2."""
        own, noise, loss = cast(SCDConfig, self.config), self.noise, super().generator_loss(batch, draws)
        if not own.vsd:
            return loss
        t = sigma_to_time(lognormal_sigmas(draws, P_mean=own.vsd_P_mean, P_std=own.vsd_P_std), noise.sigma_data)
        w = self.weights(draws)
        auxiliary, generator = (at_weight(network, w) for network in (self.networks["auxiliary"], self.generator))
        other = generator_loss(generator, partial(self.teacher, w=w), auxiliary, batch, t, draws, noise, heads=2)
        return loss._replace(value=loss.value + own.vsd * other.value, signals=loss.signals | other.signals)

    def weights(self, draws: Draws) -> Tensor | None:
        return self.teacher.weights(draws)

    def velocity(self, batch: Batch, z: Tensor, x_t: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        """dx_t/dt = sigma_d F*(x_t, t), guided."""
        return self.noise.sigma_data * self.teacher(x_t, t, batch.labels, w=w)


def since_start(t: Tensor, intervals: int) -> Tensor:
    """d = t - s, s the start of the one of M equal intervals of [0, pi/2] that t lies in.  [B]

    Source: sCM, appendix G; Heek et al. 2024 (multistep consistency models).
    """
    length = math.pi / 2 / intervals
    return t - (t / length).floor().clamp(max=intervals - 1) * length
