"""LADD: latent adversarial diffusion distillation. A generator learns from a discriminator of the teacher's features.

Sauer et al. 2024 (SIGGRAPH Asia), for EDM's networks as in FastGen; approximate R1: Lin et al. 2025 (APT).

    g    = D_theta(x_t, t),            x_t = cos(t) x0 + sin(t) z, t of one of the steps; of the first, sin(t) z
    x_s  = cos(s) g + sin(s) z,        x_s' = cos(s') x0 + sin(s') z'
    d(x_s, s) = (d_1, ..., d_n),       d_k a head on the teacher's features at level k of its encoder
    the heads tell x_s' from x_s, and g follows d(x_s, s); there is no other loss
    approximate R1: r1 |d(cos(s') x0 + sin(s') z', s') - d(cos(s') (x0 + r1_noise n) + sin(s') z', s')|^2

Differs: the paper's x0 are the teacher's samples under guidance, here they are --data (`edmdistill sample` makes such a
set); its heads follow every attention block and read the noise level and the text, too; it draws the first step most
often, here all are equally likely. Losses are means over the heads. FastGen's penalty leaves z' out of the second d.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.backward_simulation import StepLevels, of_noisy_data, require_descending, step_levels
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange, Role, Sampling, Turn
from edmdistill.methods.gan_losses import GAN_LOSSES, gan_signals
from edmdistill.networks.heads import make_head
from edmdistill.schedules import lognormal_times
from edmdistill.trigflow import diffuse


class LADDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options; P_mean and P_std are the paper's, logit(t) ~ N(1, 1) in its time, for sigma_data .5."""

    levels: StepLevels = ()
    discriminator_turns: Annotated[int, Meta(ge=1, le=1000, description="turns of it for each of the generator's")] = 1
    heads: Annotated[Literal["levels", "bottleneck"], Meta(description="features that are judged")] = "levels"
    gan_loss: Annotated[Literal["hinge", "log", "non-saturating"], Meta(description="form of the adversarial loss")] = (
        "hinge"
    )
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma) where images are judged")] = 0.3
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) there")] = 1.0
    same_noise: Annotated[bool, Meta(description="data and generated images get one noise, of one level")] = False
    r1: Annotated[float, Meta(ge=0, description="weight of the approximate R1 penalty; 0 = none")] = 0.0
    r1_noise: Annotated[float, Meta(gt=0, description="standard deviation of the noise in the R1 penalty")] = 0.1

    def __post_init__(self) -> None:
        require_descending(self.levels)
        if not self.r1:
            refuse_idle(self, ("r1_noise",), "r1 = 0", "set r1 above 0")


class LADD(Method[LADDConfig]):
    Config = LADDConfig
    noise_levels = ("levels",)
    splits_loss = True
    roles = {
        "teacher": Role(trained=False),
        "generator": Role(trained=True),
        "discriminator": Role(trained=True, make=partial(make_head, kind="levels")),
    }

    @classmethod
    def roles_for(cls, config: LADDConfig) -> dict[str, Role]:
        return cls.roles | {"discriminator": Role(trained=True, make=partial(make_head, kind=config.heads))}

    @classmethod
    def sampling(cls, config: LADDConfig) -> Sampling:
        return Sampling(1 + len(config.levels))

    @classmethod
    def schedule(cls, config: LADDConfig, noise: NoiseRange) -> tuple[float, ...]:
        return step_levels(config.levels, noise)

    def __init__(self, config: LADDConfig, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.teacher, self.generator, self.heads = (networks[role] for role in self.roles)
        self.gan, self.sigma_data = GAN_LOSSES[config.gan_loss], noise.sigma_data

    def turns(self) -> tuple[Turn, ...]:
        discriminator = (Turn("discriminator", self.discriminator_loss),)
        return *discriminator * self.config.discriminator_turns, Turn("generator", self.generator_loss)

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the heads' loss of data and of generated images, plus the penalty."""
        config, x0 = self.config, batch.x0
        with torch.no_grad():
            g = of_noisy_data(self.generator, batch, config.levels, draws, self.noise)
            s_fake, z_fake = self.noise_of(g, draws)
            s, z = (s_fake, z_fake) if config.same_noise else self.noise_of(x0, draws)
            judged = [(diffuse(x0, z, s), s), (diffuse(g, z_fake, s_fake), s_fake)]
            if config.r1:
                judged.append((diffuse(x0 + draws.normal_like(x0, config.r1_noise), z, s), s))
            features = [self.teacher(x_s, time, batch.labels, features=True) for x_s, time in judged]
        # In one pass: heads that are wrapped for several processes are called once a turn.
        real, fake, *near = self.heads([torch.cat(level) for level in zip(*features, strict=True)]).split(len(x0))
        value, signals = self.gan.discriminator(real, fake), gan_signals(real, fake)
        for logits in near:
            penalty = (real - logits).square().mean(1)
            value, signals = value + config.r1 * penalty, signals | {"r1": penalty.detach().mean()}
        return Loss(value, s_fake, signals)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the adversarial loss of generated images."""
        g = of_noisy_data(self.generator, batch, self.config.levels, draws, self.noise)
        s, z = self.noise_of(g, draws)
        return self.pieces(self.judge, diffuse(g, z, s), s, batch.labels)._replace(generated=g.detach())

    def judge(self, x_s: Tensor, s: Tensor, labels: Tensor | None) -> Loss:
        """Returns the adversarial loss of generated images at x_s."""
        return Loss(self.gan.generator(self.heads(self.teacher(x_s, s, labels, features=True))), s)

    def noise_of(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draws the time at which each image is judged, and its noise.  [B], [B,C,H,W]"""
        s = lognormal_times(draws, self.sigma_data, P_mean=self.config.P_mean, P_std=self.config.P_std)
        return s, draws.normal_like(x, self.sigma_data)
