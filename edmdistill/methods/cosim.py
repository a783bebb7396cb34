"""CoSIM: continuous semi-implicit models, a generator for any number of steps.

Yu et al. 2025 (ICML), algorithm 2.

    x_t ~ p(x_t | x0)          data at noise level t
    g   = G_phi(x_t, t)        the generator's estimate of the data
    x_s ~ q_phi(x_s | x_t)     cos(s) g + sin(s) z, the transition to s < t
    F*(x_s, s)                 teacher
    F_psi(x_s; s, t)           auxiliary score, tracks the generator's distribution at s given its start t
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.adversarial import adversarial_turns, gan_roles
from edmdistill.methods.base import Batch, Loss, Role, Turn
from edmdistill.methods.cosim_config import CoSIMConfig
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import ScoreDistillation
from edmdistill.methods.semi_implicit import auxiliary_loss, generator_loss, kl_generator_loss, time_sensitivity
from edmdistill.methods.trajectories import trajectory_loss
from edmdistill.schedules import cosim_sigmas, start_first_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time


class Transition(NamedTuple):
    """A draw of algorithm 2, lines 1-3.  s, t [B]; x_t, F, g, x_s, v [B,C,H,W].

    F is the generator's output at x_t and g its image; v is the velocity of (g, z) at s.
    """

    s: Tensor
    t: Tensor
    x_t: Tensor
    F: Tensor
    g: Tensor
    x_s: Tensor
    v: Tensor


class CoSIM(ScoreDistillation[CoSIMConfig]):
    Config = CoSIMConfig
    noise_levels = "anchor_sigma", "fisher_sigma"
    splits_loss = True
    roles = {
        "teacher": Role(trained=False),
        "generator": Role(trained=True),
        "auxiliary": Role(trained=True, two_time=True),
    }

    @classmethod
    def roles_for(cls, config: CoSIMConfig) -> dict[str, Role]:
        auxiliary = cls.roles["auxiliary"]._replace(second_gain=config.t_gain)
        return cls.roles | {"auxiliary": auxiliary} | gan_roles(config)

    def turns(self) -> tuple[Turn, ...]:
        begins = {"auxiliary": self.config.warmup_images}
        return tuple(turn._replace(begins=begins.get(turn.role, turn.begins)) for turn in super().turns())

    def generator_turns(self) -> tuple[Turn, ...]:
        begins = self.config.warmup_images  # until then, the generator learns trajectories alone
        return adversarial_turns(self.generator_loss, self.fake, self.networks, self.config, begins)

    def fake(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns g and t."""
        jump = self.generated(batch, draws)
        return jump.g, jump.t

    def notes(self) -> tuple[str, ...]:
        return self.config.notes()

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns psi's loss: it tracks the generator's score at x_s.  Source: algorithm 2, even n; eq. 15, line 2."""
        beta, sigma_data = self.config.beta, self.noise.sigma_data
        with torch.no_grad():
            jump = self.transition(batch, draws, self.config.anchor_sigma)
            F_teacher = self.teacher(jump.x_s, jump.s, batch.labels) if beta < 1 else 0.0
        F_aux = self.auxiliary(jump.x_s, jump.s, batch.labels, jump.t)
        return auxiliary_loss(F_aux, F_teacher, jump.v, jump.s, sigma_data=sigma_data, beta=beta)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns phi's loss: it closes the gap between the scores.  Source: algorithm 2, odd n; eq. 15, line 1."""
        config = self.config
        if not config.trajectory_steps:
            return self.gap_loss(batch, draws)
        trajectories = trajectory_loss(
            self.generator,
            self.teacher,
            batch,
            draws,
            self.noise,
            steps=config.trajectory_steps,
            share_to_max=config.share_to_max,
            stride=config.trajectory_stride,
        )
        if batch.images < config.warmup_images:
            return trajectories
        return self.gap_loss(batch, draws).plus(trajectories, config.trajectory_weight)

    def gap_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns eq. 15, line 1."""
        s, t, x_t, F, g, x_s, v = self.generated(batch, draws)
        return self.pieces(self.score_loss, s, t, x_t, F, x_s, v, batch.labels)._replace(generated=g)

    def score_loss(
        self, s: Tensor, t: Tensor, x_t: Tensor, F: Tensor, x_s: Tensor, v: Tensor, labels: Tensor | None
    ) -> Loss:
        """Returns the loss of a transition, through teacher and auxiliary score."""
        config, sigma_data = self.config, self.noise.sigma_data
        short = t < sigma_to_time(config.anchor_sigma, sigma_data)
        if config.anchor_sigma:  # one pass of the teacher serves both kinds of row
            s, x_s = torch.where(short, t, s), torch.where(short[:, None, None, None], x_t, x_s)
        with torch.set_grad_enabled(config.gradient == "fisher" or config.fisher_sigma > 0):
            F_teacher = self.teacher(x_s, s, labels)
            F_aux = self.auxiliary(x_s, s, labels, t)
        fisher = partial(generator_loss, sigma_data=sigma_data, alpha=config.alpha, weight=config.weight)
        kl = partial(kl_generator_loss, sigma_data=sigma_data, power=config.s_power)
        loss = (fisher if config.gradient == "fisher" else kl)(F_aux, F_teacher, v, s)
        if config.fisher_sigma:
            above = s >= sigma_to_time(config.fisher_sigma, sigma_data)
            loss = loss._replace(value=torch.where(above, fisher(F_aux, F_teacher, v, s).value, loss.value))
        if config.anchor_sigma:
            anchor = (F - F_teacher.detach()).square().flatten(1).sum(1)
            loss = loss._replace(value=torch.where(short, anchor, loss.value))
        return loss

    @torch.no_grad()
    def monitor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Returns what share of the score gap depends on t."""
        jump = self.transition(batch, draws, self.config.anchor_sigma)
        last = sigma_to_time(self.noise.sigma_max, self.noise.sigma_data).to(jump.t).expand_as(jump.t)
        F_teacher = self.teacher(jump.x_s, jump.s, batch.labels)
        F_aux, F_last = (self.auxiliary(jump.x_s, jump.s, batch.labels, t) for t in (jump.t, last))
        return {"sensitivity/auxiliary": time_sensitivity(F_aux, F_last, F_teacher, jump.t < last)}

    def generated(self, batch: Batch, draws: Draws) -> Transition:
        """Draws what the generator learns from. Trajectories, if there are any, teach jumps from below the anchor."""
        return self.transition(batch, draws, self.config.anchor_sigma if self.config.trajectory_steps else 0.0)

    def transition(self, batch: Batch, draws: Draws, sigma_from: float = 0.0) -> Transition:
        """Draws (s, t), x_t and x_s: algorithm 2, lines 1-3.  Source: appendix A.1 for (s, t), eq. 18 for x_s.

        Args:
            sigma_from: lowest noise level t of a jump; for order = "t" alone.
        """
        config, (sigma_data, sigma_min, sigma_max) = self.config, self.noise
        levels = {"sigma_min": sigma_min, "sigma_max": sigma_max, "share_to_max": config.share_to_max}
        if config.order == "t":
            sigma_s, sigma_t = start_first_sigmas(draws, **levels, sigma_from=sigma_from)
        else:
            sigma_s, sigma_t = cosim_sigmas(draws, **levels, R=config.R, r_s_max=config.r_s_max)
        s, t = sigma_to_time(sigma_s, sigma_data), sigma_to_time(sigma_t, sigma_data)
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
        F = self.generator(x_t, t, batch.labels)
        g = denoised(x_t, F, t, sigma_data)
        return Transition(s, t, x_t, F, g, *noised(g, s, draws, sigma_data))
