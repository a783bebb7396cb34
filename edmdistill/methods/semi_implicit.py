"""The two losses of score distillation with a semi-implicit transition, which CoSIM and SiD share.

x_s = cos(s) g + sin(s) z is drawn from a generated image g. At x_s three networks speak of the same velocity
v = cos(s) z - sin(s) g: the teacher sigma_d F*, the auxiliary score sigma_d F_psi, and the draw itself. In EDM's
notation D* - D_psi = sin(s) u and D* - g = sin(s) e, with

    u = sigma_d (F_psi - F*),      e = v - sigma_d F*.

Source: Yu et al. 2025 (CoSIM), eq. 15; Zhou et al. 2024 (SiD), eq. 20-23.  Differs: written with F, for the difference
of two denoisers loses its digits at small s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.methods.base import Loss
from edmdistill.trigflow import cos_sin


def auxiliary_loss(
    F_aux: Tensor, F_teacher: Tensor | float, v: Tensor, s: Tensor, *, sigma_data: float, beta: float
) -> Loss:
    """|| sigma_d F_psi - [beta v + (1-beta) sigma_d F*] ||^2, whose optimum is CoSIM's eq. 16.

    Args:
        F_aux, F_teacher, v: at x_s; only F_aux carries a gradient; for beta 1, any F_teacher will do.  [B,C,H,W]
        s: time of x_s.  [B]
        beta: 1 / (2 coef); 1 is plain denoising score matching.
    Source: CoSIM, eq. 15, second line, completed to a square.  Differs: the weight w2(s)/s^4 is EDM's, which is 1 here
    but for a constant, sigma_d^2.
    """
    target = beta * v + (1 - beta) * sigma_data * F_teacher
    return Loss((sigma_data * F_aux - target).square().flatten(1).sum(1), s)


def generator_loss(
    F_aux: Tensor, F_teacher: Tensor, v: Tensor, s: Tensor, *, sigma_data: float, alpha: float, weight: str
) -> Loss:
    """w(s) sin(s)^2 u . (e - alpha u); gradients flow through v, F_psi and F*.

    Args:
        F_aux, F_teacher, v: at x_s, all with their dependence on the generated image.  [B,C,H,W]
        s: time of x_s.  [B]
        weight: "sid": w = 1 / mean|D* - g| of each sample;  "c_out": w = 1 / c_out(s).
    Source: CoSIM, eq. 15, first line; the weight is SiD's, eq. 23 (their code clips it at 1e-5).
    """
    u, e = sigma_data * (F_aux - F_teacher), v - sigma_data * F_teacher
    sin = cos_sin(s, v)[1].flatten()
    size = e.detach().abs().flatten(1).mean(1) if weight == "sid" else sigma_data
    value = sin**2 / (sin * size).clamp(min=1e-5) * (u * (e - alpha * u)).flatten(1).sum(1)
    with torch.no_grad():
        # The loss itself oscillates about 0 and says nothing: how far the scores are apart does, and where they point.
        cosine = torch.cosine_similarity(u.flatten(1), e.flatten(1)).mean()
        signals = {"score_gap": u.square().mean().sqrt(), "cos_gap_error": cosine}
    return Loss(value, s, signals)
