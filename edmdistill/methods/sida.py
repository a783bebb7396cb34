"""SiDA: SiD with an adversary in the encoder of the auxiliary score, a one-step generator.

Zhou et al. 2025 (ICLR), as their code has it (sida_training/sida_loss.py).

    g      = G_phi(sigma_init n, sigma_init)
    x_s    = cos(s) g + sin(s) z,    x_s' = cos(s) x0 + sin(s) z
    F_psi(x_s, s) -> v / sigma_d, and the mean channel d of its bottleneck, a logit a pixel, tells x_s' from x_s
    g follows SiD's loss and -log sigmoid(d(x_s))
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import augmented
from edmdistill.methods.base import Batch, Loss, Role
from edmdistill.methods.gan_losses import NON_SATURATING, GANWeight, gan_signals
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import SCORES
from edmdistill.methods.semi_implicit import Alpha, OneStep, OneStepConfig, auxiliary_loss, generator_loss
from edmdistill.schedules import curve_times, lognormal_times
from edmdistill.trigflow import cos_sin, diffuse, velocity


class SiDAConfig(OneStepConfig, frozen=True, forbid_unknown_fields=True):
    """Options; the defaults are those of the official code for EDM's teachers."""

    alpha: Alpha = 1.0
    gan: GANWeight = 1e-4
    gan_auxiliary: Annotated[float, Meta(ge=0, description="weight of the logits' loss beside the score's")] = 1.0
    gan_warmup_images: Annotated[int, Meta(ge=0, description="images before the generator is judged")] = 200_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan:
            refuse_idle(self, ("gan_warmup_images",), "gan = 0", "set gan above 0")
        if self.exponent > 80:  # float32 ends at e^88
            raise ValueError(
                f"the weight of the logits' loss, of P_mean = {self.P_mean} and P_std = {self.P_std}, overflows at "
                f"e^{self.exponent:.4g}: choose a smaller P_std or a larger P_mean"
            )

    @property
    def exponent(self) -> float:
        """ln E[1/sigma^2], sigma being lognormal."""
        return 2 * self.P_std**2 - 2 * self.P_mean


class SiDA(OneStep[SiDAConfig]):
    Config = SiDAConfig
    roles = SCORES | {"auxiliary": Role(trained=True, head="mean")}

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns denoising score matching on generated images, plus the loss of the logits.

        Differs: the code weighs the latter by the batch mean of EDM's weight 1/sigma^2 + 1/sigma_d^2, whose expectation
            is used here; all is times sigma_d^2, as in SiD; gradients are not clipped.
        """
        config, sigma_data = self.config, self.noise.sigma_data
        with torch.no_grad():
            generated = augmented(batch._replace(x0=self.generate(batch, draws)), draws, config)
            data = augmented(batch, draws, config)
        s = lognormal_times(draws, sigma_data, P_mean=config.P_mean, P_std=config.P_std)
        z = draws.normal_like(batch.x0, sigma_data)
        F_aux, fake = generated.conditioned(self.auxiliary)(diffuse(generated.x0, z, s), s, batch.labels, logits="also")
        real = data.conditioned(self.auxiliary)(diffuse(data.x0, z, s), s, batch.labels, logits="alone")
        loss = auxiliary_loss(F_aux, 0.0, velocity(generated.x0, z, s), s, sigma_data=sigma_data, beta=1.0)
        mean_weight = math.exp(config.exponent) + sigma_data**-2
        judged = config.gan_auxiliary * sigma_data**2 * mean_weight / 2 * NON_SATURATING.discriminator(real, fake)
        return loss._replace(value=loss.value + judged, signals=gan_signals(real, fake))

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns SiD's loss, plus gan D / mean |D* - g| of each image times the loss of its logits.

        Differs: the code multiplies the batch means of these two, and its first 100,000 images train psi alone.
        """
        config = self.config
        s = curve_times(draws, *self.noise, high=config.r_s_max)
        g = self.generate(batch, draws)
        x_s, v = noised(g, s, draws, self.noise.sigma_data)
        gan = config.gan if batch.images >= config.gan_warmup_images else 0.0
        return self.pieces(partial(self.score_loss, gan), x_s, v, s, batch.labels)._replace(generated=g.detach())

    def score_loss(self, gan: float, x_s: Tensor, v: Tensor, s: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of generated images at x_s, through teacher and auxiliary score."""
        config, sigma_data = self.config, self.noise.sigma_data
        F_teacher = self.teacher(x_s, s, labels)
        F_aux, logits = self.auxiliary(x_s, s, labels, logits="also")
        loss = generator_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, alpha=config.alpha, weight=config.weight)
        if gan:
            size = (cos_sin(s, v)[1] * (v - sigma_data * F_teacher)).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            judged = NON_SATURATING.generator(logits.clamp(-10, 10))
            loss = loss._replace(value=loss.value + gan * v[0].numel() / size * judged)
        return loss
