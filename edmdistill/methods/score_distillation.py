"""The two losses of adaptive variational score distillation (aVSD), which vsd and scd share.

A generated image g is diffused again, x_t = cos(t) g + sin(t) z. There the teacher's sigma_d F* is the velocity of the
data, and sigma_d F_phi that of generated images, which the auxiliary score learns. The gap between them says where g
is to go, for the laws of x_t, q_t of the generator and p_t of the data, come nearer by it:

    d KL(q_t || p_t) / d theta = E[ cos(t)^2 / (sigma_d sin(t)) (F* - F_phi) . d g / d theta ]

Source: Wang et al. 2023 (VSD); Yin et al. 2024 (DMD); Lu & Song 2025 (sCM), appendix C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, NoiseRange
from edmdistill.methods.weighting import adaptive
from edmdistill.trigflow import cos_sin, denoised, diffuse, sigma_to_time, velocity


def auxiliary_loss(
    auxiliary: FlowFunction, generator: FlowFunction, batch: Batch, t: Tensor, draws: Draws, noise: NoiseRange
) -> Loss:
    """e^-u / D |F_phi(x_t, t) - v / sigma_d|^2 + u: diffusion training on generated images.

    Args:
        t: of x_t.  [B]
    Source: sCM, L_Diff(phi), appendix C.2; the weight, which is left open there, is appendix D's.
    """
    sigma_data = noise.sigma_data
    x, start = pure_noise(batch, draws, noise)
    with torch.no_grad():
        g = denoised(x, generator(x, start, batch.labels), start, sigma_data)
    z = draws.normal_like(g, sigma_data)
    F, u = auxiliary(diffuse(g, z, t), t, batch.labels, u_at=(t,))
    error = F - velocity(g, z, t) / sigma_data
    return Loss(adaptive(error, u), t, {"velocity_error": error.detach().square().mean()})


def generator_loss(
    generator: FlowFunction,
    teacher: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    auxiliary: FlowFunction,
    batch: Batch,
    t: Tensor,
    draws: Draws,
    noise: NoiseRange,
    heads: int = 1,
) -> Loss:
    """e^-u / D |g - g^- + F* - F_phi|^2 + u: its gradient in g is 2 e^-u / D (F* - F_phi).

    Args:
        t: of x_t.  [B]
        heads: how many the generator has for u; the last is this loss's.
    Source: sCM, L_VSD(theta, psi), appendix C.2: the weight over t that KL would have is e^-u in its place.
    Differs: nothing. But g has the unit of images and F has none: as the first difference is 0, that bears on the
        gradient's length alone. In the generator's F it is sigma_d times what it were if all had the same unit, which
        counts beside another loss.
    """
    sigma_data = noise.sigma_data
    x, start = pure_noise(batch, draws, noise)
    F, *_, u = generator(x, start, batch.labels, u_at=(t,) * heads)
    g = denoised(x, F, start, sigma_data)
    with torch.no_grad():
        x_t = diffuse(g, draws.normal_like(g, sigma_data), t)
        gap = teacher(x_t, t, batch.labels) - auxiliary(x_t, t, batch.labels)
    value = adaptive(g - g.detach() + gap, u)
    return Loss(value, t, {"score_gap": gap.square().mean().sqrt()}, g.detach())


def pure_noise(batch: Batch, draws: Draws, noise: NoiseRange) -> tuple[Tensor, Tensor]:
    """(x_t, t) from which a generator makes images in one step, one for each label.  [B,C,H,W], [B]

    Of the data only the shape is used.
    Source: sCM, table 4, t_max = arctan(sigma_max / sigma_d).  Differs: appendix C.2 starts at pi/2, which no network
        knows; x_t there and here are the same but for a share of 2e-5.
    """
    t = sigma_to_time(noise.sigma_max, noise.sigma_data).expand(len(batch.x0))
    return cos_sin(t, batch.x0)[1] * draws.normal_like(batch.x0, noise.sigma_data), t
