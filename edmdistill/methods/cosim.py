"""CoSIM: continuous semi-implicit models, a generator for any number of steps.

Yu et al. 2025 (ICML), algorithm 2.

    x_t ~ p(x_t | x0)          data at noise level t
    g   = G_phi(x_t, t)        the generator's estimate of the data
    x_s ~ q_phi(x_s | x_t)     cos(s) g + sin(s) z, the transition to s < t
    F*(x_s, s)                 teacher
    F_psi(x_s; s, t)           auxiliary score, tracks the generator's distribution at s given its start t
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Role
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import ScoreDistillation
from edmdistill.methods.semi_implicit import Alpha, Weight, auxiliary_loss, generator_loss
from edmdistill.schedules import cosim_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time


class CoSIMConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Differs: the paper requires lambda >= 0 in coef = alpha (1 + lambda), but trains alpha 1.2 with coef 1; its
    eq. 12 defines another lambda, 2 coef - 1. The losses depend on alpha and coef only, so these are the options."""

    alpha: Alpha = 1.2
    coef: Annotated[float, Meta(gt=0, description="pull of the auxiliary score towards the teacher; .5 = none")] = 1.0
    R: Annotated[
        int, Meta(ge=1, le=100_000, description="largest divisor of a jump; a higher R gives more small jumps")
    ] = 4
    share_to_max: Annotated[float, Meta(ge=0, le=1, description="share of jumps that start at sigma_max")] = 0.5
    r_s_max: Annotated[float, Meta(gt=0, le=1, description="upper end of s, as r of EDM's curve; 1 = sigma_max")] = 1.0
    weight: Weight = "sid"
    force: Annotated[bool, Meta(description="allow coef below .5")] = False

    def __post_init__(self) -> None:
        if self.coef < 0.5 and not self.force:
            raise ValueError(
                f"coef {self.coef} is below .5: the auxiliary score would overshoot its data; force = true allows it"
            )

    @property
    def beta(self) -> float:
        """Share of the generator's own score in the auxiliary score's target.  Source: eq. 16."""
        return 1 / (2 * self.coef)


class Transition(NamedTuple):
    """A draw of algorithm 2, lines 1-3.  s, t [B]; g, x_s, v [B,C,H,W], v the velocity of (g, z) at s."""

    s: Tensor
    t: Tensor
    g: Tensor
    x_s: Tensor
    v: Tensor


class CoSIM(ScoreDistillation[CoSIMConfig]):
    Config = CoSIMConfig
    roles = {
        "teacher": Role(trained=False),
        "generator": Role(trained=True),
        "auxiliary": Role(trained=True, two_time=True),
    }

    def notes(self) -> tuple[str, ...]:
        """Returns eq. 38: at psi's optimum the generator's loss is (2 coef - alpha) / (4 coef^2) Fisher divergence."""
        alpha, coef, beta = self.config.alpha, self.config.coef, self.config.beta
        factor = (2 * coef - alpha) / (4 * coef**2)
        derived = f"beta {beta:.3g}, lambda {coef / alpha - 1:.3g} (eq. 15) or {2 * coef - 1:.3g} (eq. 12)"
        note = f"alpha {alpha:g} and coef {coef:g} give {derived}; eq. 38's factor is {factor:.3g}"
        return (note,) if factor > 0 else (note, "a factor of 0 or less can diverge: raise coef above alpha / 2")

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2, even n: psi tracks the generator's score at x_s.  Source: eq. 15, second line."""
        with torch.no_grad():
            s, t, _, x_s, v = self.transition(batch, draws)
            F_teacher = self.teacher(x_s, s, batch.labels)
        F_aux = self.auxiliary(x_s, s, batch.labels, t)
        return auxiliary_loss(F_aux, F_teacher, v, s, sigma_data=self.noise.sigma_data, beta=self.config.beta)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2, odd n: phi closes the gap between the two scores.  Source: eq. 15, first line."""
        config, sigma_data = self.config, self.noise.sigma_data
        s, t, g, x_s, v = self.transition(batch, draws)
        F_teacher = self.teacher(x_s, s, batch.labels)
        F_aux = self.auxiliary(x_s, s, batch.labels, t)
        loss = generator_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, alpha=config.alpha, weight=config.weight)
        return loss._replace(generated=g.detach())

    def transition(self, batch: Batch, draws: Draws) -> Transition:
        """Draws (s, t), x_t and x_s: algorithm 2, lines 1-3.  Source: appendix A.1 for (s, t), eq. 18 for x_s."""
        config, (sigma_data, sigma_min, sigma_max) = self.config, self.noise
        sigma_s, sigma_t = cosim_sigmas(
            draws,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            R=config.R,
            share_to_max=config.share_to_max,
            r_s_max=config.r_s_max,
        )
        s, t = sigma_to_time(sigma_s, sigma_data), sigma_to_time(sigma_t, sigma_data)
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
        g = denoised(x_t, self.generator(x_t, t, batch.labels), t, sigma_data)
        return Transition(s, t, g, *noised(g, s, draws, sigma_data))
