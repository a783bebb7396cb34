"""DMD2: distribution matching by two scores and an adversary in one of them, in one step or several.

Yin et al. 2024 (NeurIPS), as their code for EDM has it; the weight h(r) is of f-distill (Xu et al. 2025).

    x_k, t_k                        pure noise, then the generator's image of step k - 1, or data, with noise of level k
    g = G_theta(x_k, t_k),          x_t = cos(t) g + sin(t) z
    F_psi(x_t, t) -> v / sigma_d    the auxiliary ("fake") score, several turns a round; the logit d_psi(x_t, t) of its
                                    bottleneck tells diffused data from diffused images
    g <- g - h(r) (D_psi - D*)(x_t, t) / mean |g - D*|,  r = exp(d_psi),  and -log sigmoid(d_psi) falls
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.backward_simulation import (
    StepLevels,
    of_every_step,
    of_noisy_data,
    of_one_step,
    require_descending,
    step_levels,
)
from edmdistill.methods.base import Batch, Loss, NoiseRange, Preview, Role, Sampling, Turn
from edmdistill.methods.distances import l2
from edmdistill.methods.divergence import Divergence, density_ratio, divergence_weights
from edmdistill.methods.gan_losses import NON_SATURATING, GANWeight, gan_signals
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import SCORES, AuxiliaryTurns, ScoreDistillation
from edmdistill.methods.semi_implicit import gap_signals
from edmdistill.schedules import curve_times


class DMD2Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options; the defaults are those of the official code for ImageNet at 64x64."""

    levels: StepLevels = ()
    backward_simulation: Annotated[
        bool, Meta(description="later steps start from the generator's own images; false: from data")
    ] = True
    auxiliary_turns: AuxiliaryTurns = 5
    gan: GANWeight = 3e-3
    gan_auxiliary: Annotated[float, Meta(ge=0, description="weight of the head's loss beside the score's")] = 1e-2
    f_divergence: Divergence = "reverse-kl"

    def __post_init__(self) -> None:
        require_descending(self.levels)
        if not self.gan:
            refuse_idle(self, ("gan_auxiliary", "f_divergence"), "gan = 0", "set gan above 0")
        if not self.levels:
            refuse_idle(self, ("backward_simulation",), "levels = []", "set levels")


class DMD2(ScoreDistillation[DMD2Config]):
    Config = DMD2Config
    noise_levels = ("levels",)
    roles = SCORES | {"auxiliary": Role(trained=True, head="bottleneck")}

    @classmethod
    def roles_for(cls, config: DMD2Config) -> dict[str, Role]:
        return cls.roles if config.gan else SCORES

    @classmethod
    def sampling(cls, config: DMD2Config) -> Sampling:
        return Sampling(1 + len(config.levels))

    @classmethod
    def schedule(cls, config: DMD2Config, noise: NoiseRange) -> tuple[float, ...]:
        return step_levels(config.levels, noise)

    def generator_turns(self) -> tuple[Turn, ...]:
        preview = None if self.config.f_divergence == "reverse-kl" else self.density_ratios
        return (Turn("generator", self.generator_loss, preview),)

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns EDM's loss of generated images, a mean over pixels, plus the head's loss of them and of data.

        Differs: the official code diffuses the images once for each loss, to one of 1000 levels of the curve.
        """
        config, sigma_data = self.config, self.noise.sigma_data
        t = curve_times(draws, *self.noise)
        with torch.no_grad():
            images = of_every_step if config.backward_simulation else of_noisy_data
            g = images(self.generator, batch, config.levels, draws, self.noise)
            x_t, v = noised(g, t, draws, sigma_data)
        if not config.gan:
            return Loss(l2(self.auxiliary(x_t, t, batch.labels), v / sigma_data), t)
        F, fake = self.auxiliary(x_t, t, batch.labels, logits="also")
        s = curve_times(draws, *self.noise)
        real = self.auxiliary(noised(batch.x0, s, draws, sigma_data)[0], s, batch.labels, logits="alone")
        judged = config.gan_auxiliary * NON_SATURATING.discriminator(real, fake)
        return Loss(l2(F, v / sigma_data) + judged, t, gan_signals(real, fake))

    def density_ratios(self, batch: Batch, draws: Draws) -> Preview:
        """Returns r and sigma of every row of the whole batch, 0 for rows of other micro-batches."""
        with torch.no_grad():
            _, x_t, t, _ = self.diffused(batch, draws)
            r = density_ratio(self.auxiliary(x_t, t, batch.labels, logits="alone"))
        return Preview({"r": draws.in_batch(r), "sigma": draws.in_batch(self.noise.sigma_data * t.tan())})

    def generator_loss(self, batch: Batch, draws: Draws, preview: Preview | None = None) -> Loss:
        """Returns a loss with the gradient h(r) (D_psi - D*) / mean |g - D*| / D in g, plus the adversarial one."""
        config, (sigma_data, *sigmas) = self.config, self.noise
        g, x_t, t, v = self.diffused(batch, draws)
        with torch.no_grad():
            F_teacher = self.teacher(x_t, t, batch.labels)
            # D_psi - D* = -sin(t) u and g - D* = -sin(t) e.
            u, e = sigma_data * (self.auxiliary(x_t, t, batch.labels) - F_teacher), v - sigma_data * F_teacher
            gradient = -u / e.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
            if preview is not None:
                h = divergence_weights(config.f_divergence, preview.means["r"], preview.means["sigma"], *sigmas)
                gradient = gradient * h[draws.rows, None, None, None].to(gradient)
        value, signals = 0.5 * l2(g, (g - gradient).detach()), gap_signals(u, e)
        if config.gan:
            value = value + config.gan * NON_SATURATING.generator(self.auxiliary(x_t, t, batch.labels, logits="alone"))
        return Loss(value, t, signals, g.detach())

    def diffused(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns g and, where the two scores are compared, x_t, t and v."""
        images = of_one_step if self.config.backward_simulation else of_noisy_data
        g = images(self.generator, batch, self.config.levels, draws, self.noise)
        t = curve_times(draws, *self.noise, low=0.02, high=0.98)
        x_t, v = noised(g, t, draws, self.noise.sigma_data)
        return g, x_t, t, v
