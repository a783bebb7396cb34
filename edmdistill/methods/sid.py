"""SiD: score identity distillation, a one-step generator trained from the teacher alone.

Zhou et al. 2024 (ICML), algorithm 1: CoSIM's losses with one starting level and an auxiliary score of one time.

    g   = G_phi(sigma_init n, sigma_init)
    x_s = cos(s) g + sin(s) z
"""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import augmented
from edmdistill.methods.base import Batch, Loss
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import SCORES
from edmdistill.methods.semi_implicit import Alpha, OneStep, OneStepConfig, auxiliary_loss, generator_loss
from edmdistill.schedules import curve_times, lognormal_times


class SiDConfig(OneStepConfig, frozen=True, forbid_unknown_fields=True):
    alpha: Alpha = 1.2
    coef: Annotated[float, Meta(ge=0.5, description="pull of the auxiliary score toward the teacher; .5 = none")] = 0.5


class SiD(OneStep[SiDConfig]):
    Config = SiDConfig
    roles = SCORES

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns denoising score matching on generated images.  Source: SiD, eq. 8 (coef .5)."""
        config, sigma_data, beta = self.config, self.noise.sigma_data, 1 / (2 * self.config.coef)
        with torch.no_grad():
            s = lognormal_times(draws, sigma_data, P_mean=config.P_mean, P_std=config.P_std)
            generated = augmented(batch._replace(x0=self.generate(batch, draws)), draws, config)
            x_s, v = noised(generated.x0, s, draws, sigma_data)
            F_teacher = generated.conditioned(self.teacher)(x_s, s, batch.labels) if beta < 1 else 0.0
        F_aux = generated.conditioned(self.auxiliary)(x_s, s, batch.labels)
        return auxiliary_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, beta=beta)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the generator's score identity loss.  Source: SiD, eq. 23."""
        sigma_data = self.noise.sigma_data
        s = curve_times(draws, *self.noise, high=self.config.r_s_max)
        g = self.generate(batch, draws)
        x_s, v = noised(g, s, draws, sigma_data)
        return self.pieces(self.score_loss, x_s, v, s, batch.labels)._replace(generated=g.detach())

    def score_loss(self, x_s: Tensor, v: Tensor, s: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of generated images at x_s, through teacher and auxiliary score."""
        config, sigma_data = self.config, self.noise.sigma_data
        F_teacher, F_aux = self.teacher(x_s, s, labels), self.auxiliary(x_s, s, labels)
        return generator_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, alpha=config.alpha, weight=config.weight)
