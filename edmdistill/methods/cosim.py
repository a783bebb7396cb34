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
from typing import Annotated, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.adversarial import GANConfig, adversarial_turns, gan_roles
from edmdistill.methods.base import Batch, Loss, Role, Turn
from edmdistill.methods.noising import noised
from edmdistill.methods.score_distillation import AuxiliaryTurns, ScoreDistillation
from edmdistill.methods.semi_implicit import Alpha, Weight, auxiliary_loss, generator_loss, kl_generator_loss
from edmdistill.methods.trajectories import (
    TrajectorySteps,
    TrajectoryWeight,
    WarmupImages,
    trajectory_loss,
    with_trajectories,
)
from edmdistill.schedules import cosim_sigmas, start_first_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time


class CoSIMConfig(GANConfig, frozen=True, forbid_unknown_fields=True):
    """Options; the defaults are the paper's.

    gradient = "kl", order = "t", anchor_sigma and the trajectories are not in the paper: docs/cosim.md says what for.

    Differs: the paper requires lambda >= 0 in coef = alpha (1 + lambda), but trains alpha 1.2 with coef 1; its
    eq. 12 defines another lambda, 2 coef - 1. The losses depend on alpha and coef only, so these are the options."""

    alpha: Alpha = 1.2
    coef: Annotated[float, Meta(gt=0, description="pull of the auxiliary score toward the teacher; .5 = none")] = 1.0
    R: Annotated[
        int, Meta(ge=1, le=100_000, description="largest divisor of a jump; a higher R gives more small jumps")
    ] = 4
    share_to_max: Annotated[float, Meta(ge=0, le=1, description="share of jumps that start at sigma_max")] = 0.5
    r_s_max: Annotated[float, Meta(gt=0, le=1, description="upper end of s, as r of EDM's curve; 1 = sigma_max")] = 1.0
    weight: Weight = "sid"
    gradient: Annotated[
        Literal["fisher", "kl"],
        Meta(description="the generator's: fisher, through both scores; kl, their difference itself, as in DMD"),
    ] = "fisher"
    s_power: Annotated[float, Meta(ge=0, le=4, description="power of sin(s) in the weight of the gradient kl")] = 1.0
    order: Annotated[
        Literal["s", "t"], Meta(description="drawn first: s, or t with s uniform below it, whatever R and r_s_max")
    ] = "s"
    t_gain: Annotated[
        float,
        Meta(ge=0, le=10, description="weight of t in the auxiliary score at first; 0 keeps the teacher's function"),
    ] = 0.0
    anchor_sigma: Annotated[
        float, Meta(ge=0, description="jumps from below this noise level learn the teacher's denoiser, or trajectories")
    ] = 0.0
    trajectory_steps: TrajectorySteps = 0
    trajectory_weight: TrajectoryWeight = 0.5
    warmup_images: WarmupImages = 0
    auxiliary_turns: AuxiliaryTurns = 1
    force: Annotated[bool, Meta(description="allow coef below .5")] = False

    def __post_init__(self) -> None:
        if self.anchor_sigma and self.order != "t":
            raise ValueError('anchor_sigma divides the levels t, which order = "t" draws first: set both or neither')
        if self.warmup_images and not self.trajectory_steps:
            raise ValueError("until warmup_images the generator learns trajectories: set trajectory_steps too")
        if self.coef < 0.5 and not self.force:
            raise ValueError(
                f"coef {self.coef} is below .5: the auxiliary score would overshoot its data; force = true allows it"
            )

    @property
    def beta(self) -> float:
        """Share of the generator's own score in the auxiliary score's target.  Source: eq. 16."""
        return 1 / (2 * self.coef)


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
        return adversarial_turns(self.generator_loss, self.fake, self.networks, self.config)

    def fake(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns g and t."""
        jump = self.transition(batch, draws)
        return jump.g, jump.t

    def notes(self) -> tuple[str, ...]:
        """Returns eq. 38: at psi's optimum the generator's loss is (2 coef - alpha) / (4 coef^2) Fisher divergence."""
        if self.config.gradient == "kl":
            return ()
        alpha, coef, beta = self.config.alpha, self.config.coef, self.config.beta
        factor = (2 * coef - alpha) / (4 * coef**2)
        derived = f"beta {beta:.3g}, lambda {coef / alpha - 1:.3g} (eq. 15) or {2 * coef - 1:.3g} (eq. 12)"
        note = f"alpha {alpha:g} and coef {coef:g} give {derived}; eq. 38's factor is {factor:.3g}"
        return (note,) if factor > 0 else (note, "a factor of 0 or less can diverge: raise coef above alpha / 2")

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2, even n: psi tracks the generator's score at x_s.  Source: eq. 15, second line."""
        beta, sigma_data = self.config.beta, self.noise.sigma_data
        with torch.no_grad():
            jump = self.transition(batch, draws, sigma_from=self.config.anchor_sigma)
            F_teacher = self.teacher(jump.x_s, jump.s, batch.labels) if beta < 1 else 0.0
        F_aux = self.auxiliary(jump.x_s, jump.s, batch.labels, jump.t)
        return auxiliary_loss(F_aux, F_teacher, jump.v, jump.s, sigma_data=sigma_data, beta=beta)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2, odd n: phi closes the gap between the two scores.  Source: eq. 15, first line."""
        config = self.config
        if not config.trajectory_steps:
            return self.gap_loss(batch, draws)
        steps, share = config.trajectory_steps, config.share_to_max
        networks = self.generator, self.teacher
        trajectories = partial(trajectory_loss, *networks, noise=self.noise, steps=steps, share_to_max=share)
        loss = partial(self.gap_loss, sigma_from=config.anchor_sigma)
        weight, warmup_images = config.trajectory_weight, config.warmup_images
        return with_trajectories(loss, trajectories, batch, draws, weight=weight, warmup_images=warmup_images)

    def gap_loss(self, batch: Batch, draws: Draws, sigma_from: float = 0.0) -> Loss:
        """Returns eq. 15, first line, of jumps from sigma_from up, where t comes first."""
        s, t, x_t, F, g, x_s, v = self.transition(batch, draws, sigma_from)
        return self.pieces(self.score_loss, s, t, x_t, F, x_s, v, batch.labels)._replace(generated=g)

    def score_loss(
        self, s: Tensor, t: Tensor, x_t: Tensor, F: Tensor, x_s: Tensor, v: Tensor, labels: Tensor | None
    ) -> Loss:
        """Returns the loss of a transition, through teacher and auxiliary score."""
        config, sigma_data = self.config, self.noise.sigma_data
        short = t < sigma_to_time(config.anchor_sigma, sigma_data)
        if config.anchor_sigma:  # one pass of the teacher serves both kinds of row
            s, x_s = torch.where(short, t, s), torch.where(short[:, None, None, None], x_t, x_s)
        with torch.set_grad_enabled(config.gradient == "fisher"):
            F_teacher = self.teacher(x_s, s, labels)
            F_aux = self.auxiliary(x_s, s, labels, t)
        if config.gradient == "kl":
            loss = kl_generator_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, power=config.s_power)
        else:
            alpha, weight = config.alpha, config.weight
            loss = generator_loss(F_aux, F_teacher, v, s, sigma_data=sigma_data, alpha=alpha, weight=weight)
        if config.anchor_sigma:
            anchor = (F - F_teacher.detach()).square().flatten(1).sum(1)
            loss = loss._replace(value=torch.where(short, anchor, loss.value))
        return loss

    @torch.no_grad()
    def monitor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Returns |u(t) - u(t_max)| / |u(t)|, u = sigma_d (F_psi - F*), over jumps that start below t_max.

        It is what the auxiliary score makes of t at the same x_s: 0 where it ignores t.
        """
        jump = self.transition(batch, draws, sigma_from=self.config.anchor_sigma)
        last = sigma_to_time(self.noise.sigma_max, self.noise.sigma_data).to(jump.t)
        F_teacher = self.teacher(jump.x_s, jump.s, batch.labels)
        F_aux = self.auxiliary(jump.x_s, jump.s, batch.labels, jump.t)
        change = F_aux - self.auxiliary(jump.x_s, jump.s, batch.labels, last.expand_as(jump.t))
        below = jump.t < last
        size, moved = ((below * v.square().flatten(1).sum(1)).sum() for v in (F_aux - F_teacher, change))
        return {"sensitivity/auxiliary": (moved / size.clamp(min=1e-12)).sqrt()}

    def transition(self, batch: Batch, draws: Draws, sigma_from: float = 0.0) -> Transition:
        """Draws (s, t), x_t and x_s: algorithm 2, lines 1-3.  Source: appendix A.1 for (s, t), eq. 18 for x_s.

        sigma_from: lowest level t, where t comes first.
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
