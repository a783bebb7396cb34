"""Score distillation with a semi-implicit transition: the two losses of CoSIM and SiD.

x_s = cos(s) g + sin(s) z is drawn from a generated image g. At x_s there are three velocities: the teacher's
sigma_d F*, the auxiliary score's sigma_d F_psi, and that of the draw, v = cos(s) z - sin(s) g. In EDM's notation
D* - D_psi = sin(s) u and D* - g = sin(s) e, with

    u = sigma_d (F_psi - F*),      e = v - sigma_d F*.

Source: Yu et al. 2025 (CoSIM), eq. 15; Zhou et al. 2024 (SiD), eq. 20-23.  Differs: written in F, because the
difference of two denoisers cancels catastrophically at small s.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import AugmentConfig, augment_role
from edmdistill.methods.base import Batch, Loss, NoiseRange, Role, Sampling
from edmdistill.methods.noising import one_step
from edmdistill.methods.score_distillation import AuxiliaryMean, AuxiliaryStd, AuxiliaryTurns, ScoreDistillation
from edmdistill.methods.weighting import mean_rms
from edmdistill.trigflow import cos_sin

Alpha = Annotated[float, Meta(gt=0, description="weight of the squared score gap in the generator's loss")]
Weight = Annotated[Literal["sid", "c_out"], Meta(description="weighting of the generator's loss over s")]


class OneStepConfig(AugmentConfig, frozen=True, forbid_unknown_fields=True):
    """The options that SiD and SiDA share."""

    sigma_init: Annotated[float, Meta(gt=0, description="noise level at which the generator starts")] = 2.5
    P_mean: AuxiliaryMean = -1.2
    P_std: AuxiliaryStd = 1.2
    r_s_max: Annotated[
        float, Meta(gt=0, le=1, description="upper end of s in the generator's turn, as r of EDM's curve")
    ] = 0.8
    weight: Weight = "sid"
    auxiliary_turns: AuxiliaryTurns = 1


OneStepT = TypeVar("OneStepT", bound=OneStepConfig)


class OneStep(ScoreDistillation[OneStepT]):
    """The generator that SiD and SiDA share: of one step, which starts at sigma_init."""

    noise_levels = ("sigma_init",)
    splits_loss = True

    @classmethod
    def roles_for(cls, config: OneStepT) -> dict[str, Role]:
        return {name: role if name == "generator" else augment_role(role, config) for name, role in cls.roles.items()}

    @classmethod
    def sampling(cls, config: OneStepT) -> Sampling:
        return Sampling(steps=1)

    @classmethod
    def schedule(cls, config: OneStepT, noise: NoiseRange) -> tuple[float, ...]:
        return (config.sigma_init,)

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """Returns one generated image for each label of the batch.  [B,C,H,W]"""
        return one_step(self.generator, batch, self.config.sigma_init, draws, self.noise.sigma_data)[0]


def auxiliary_loss(
    F_aux: Tensor, F_teacher: Tensor | float, v: Tensor, s: Tensor, *, sigma_data: float, beta: float
) -> Loss:
    """Returns || sigma_d F_psi - [beta v + (1-beta) sigma_d F*] ||^2, whose minimizer is CoSIM's eq. 16.

    Args:
        F_aux, F_teacher, v: at x_s; only F_aux has a gradient; with beta = 1 F_teacher is not used.  [B,C,H,W]
        s: time of x_s.  [B]
        beta: 1 / (2 coef); 1 is plain denoising score matching.
    Source: CoSIM, eq. 15, second line, with the square completed.  Differs: the weight w2(s)/s^4 is EDM's, which is 1
        in TrigFlow up to the constant sigma_d^2.
    """
    target = beta * v + (1 - beta) * sigma_data * F_teacher
    return Loss((sigma_data * F_aux - target).square().flatten(1).sum(1), s)


def generator_loss(
    F_aux: Tensor, F_teacher: Tensor, v: Tensor, s: Tensor, *, sigma_data: float, alpha: float, weight: str
) -> Loss:
    """Returns w(s) sin(s)^2 u . (e - alpha u); gradients flow through v, F_psi and F*.

    Args:
        F_aux, F_teacher, v: at x_s, as functions of the generated image.  [B,C,H,W]
        s: time of x_s.  [B]
        weight: "sid": w = 1 / mean |D* - g| of each sample;  "c_out": w = 1 / c_out(s).
    Source: CoSIM, eq. 15, first line; the weight is SiD's, eq. 23 (their code clips it at 1e-5).
    """
    u, e = sigma_data * (F_aux - F_teacher), v - sigma_data * F_teacher
    sin = cos_sin(s, v)[1].flatten()
    size = e.detach().abs().flatten(1).mean(1) if weight == "sid" else sigma_data
    value = sin**2 / (sin * size).clamp(min=1e-5) * (u * (e - alpha * u)).flatten(1).sum(1)
    return Loss(value, s, gap_signals(u, e))


def kl_generator_loss(
    F_aux: Tensor, F_teacher: Tensor, v: Tensor, s: Tensor, *, sigma_data: float, power: float
) -> Loss:
    """Returns sin(s)^(power - 1) u . v / size, whose gradient in g is -sin(s)^power u / size, size = mean |e| + rms u.

    That is the gradient of KL(q(x_s; s, t) || p(x_s; s)) under a weight over s; D* and D_psi have none, so an error of
    the auxiliary score reaches the generator once, and not through the derivatives of two networks as well.

    Args:
        F_aux, F_teacher: at x_s.  [B,C,H,W]
        v: at x_s, as a function of the generated image.  [B,C,H,W]
        s: time of x_s.  [B]
        power: 0 is DMD's weight, 1 calms small s, where the gap is large and says little of an image's content.
    Source: Yin et al. 2024 (DMD), eq. 7 and 8.  Differs: rms u in the weight, so that samples at which the auxiliary
        score is far off do not outweigh the others.
    """
    u, e = (sigma_data * (F_aux - F_teacher)).detach(), (v - sigma_data * F_teacher).detach()
    size = e.abs().flatten(1).mean(1) + u.square().flatten(1).mean(1).sqrt()
    sin = cos_sin(s, v)[1].flatten()
    return Loss(sin ** (power - 1) * (u * v).flatten(1).sum(1) / size.clamp(min=1e-5), s, gap_signals(u, e))


@torch.no_grad()
def gap_signals(u: Tensor, e: Tensor) -> dict[str, Tensor]:
    """Returns the gap's size and direction.  u, e: see above; the loss itself may oscillate around 0.  [B,C,H,W]"""
    cosine = torch.cosine_similarity(u.flatten(1), e.flatten(1)).mean()
    return {"score_gap": mean_rms(u), "cos_gap_error": cosine}


def time_sensitivity(F_aux: Tensor, F_last: Tensor, F_teacher: Tensor, below: Tensor) -> Tensor:
    """Returns |u(t) - u(t_max)| / |u(t)| at the same x_s: 0 of an auxiliary score that ignores t.

    Args:
        F_aux, F_last, F_teacher: at (x_s; s, t), (x_s; s, t_max) and (x_s; s).  [B,C,H,W]
        below: whether t < t_max; other rows do not count.  [B]
    """
    changes = F_aux - F_last, F_aux - F_teacher
    moved, size = ((below * change.square().flatten(1).sum(1)).sum() for change in changes)
    return (moved / size.clamp(min=1e-12)).sqrt()
