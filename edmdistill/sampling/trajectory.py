"""Sampling guided by a loss to a reference image: strokes to photos, inpainting, colorization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from edmdistill.arguments import require_fields
from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import Denoiser
from edmdistill.schedules import edm_curve

MAX_WEIGHT, MAX_CORRECTORS = 1e6, 10_000


def paper_sigmas(sigma_min: float, sigma_max: float) -> Tensor:
    """Returns the noise levels of the paper's figure 6: .35 and .45 of EDM's curve, 8.6 and 3.9.  [2] float64

    Source: CTM, appendix C.5.  Differs: t0 and t1 are the other way round there, which would increase.
    """
    return edm_curve(torch.tensor([0.65, 0.55]), sigma_min, sigma_max)


@dataclass(frozen=True, kw_only=True)
class ReferenceGuidance:
    """Pulls samples toward an image by L(x, y) = |features(cos(t) x) - features(cos(t) y)|^2 / (2 sigma_data^2).

    Attributes:
        image: the reference, in [-1, 1].  [C,H,W]
        features: differentiable, of images of TrigFlow's scale, which is about [-1, 1] at every noise level; a row's
            depend on that row alone.  [B,C,H,W] -> [B,...]
        weight: c, of the loss.
        correctors: M, the number of Langevin steps at each noise level above 0.
        step: size of a corrector's step, in units of the noise level: zeta = (step sigma)^2.
        score: a denoiser of the same images, for a generator that has not learned the score.
    Raises: EdmDistillError: a value of the wrong type or out of range, or an image that is not finite.
    """

    image: Tensor
    features: Callable[[Tensor], Tensor]
    weight: float = 1.0
    correctors: int = 10
    step: float = 0.32
    score: Denoiser | None = None

    def __post_init__(self) -> None:
        require_fields(self)
        for name, most in (("weight", MAX_WEIGHT), ("correctors", MAX_CORRECTORS), ("step", 10.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise EdmDistillError(f"the {name} of a reference must be in [0, {most:g}], but it is {value:g}")
        if not bool(self.image.isfinite().all()):
            raise EdmDistillError("the reference image holds NaN or infinity: use another image")


def reference_sampler(
    jump: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    denoiser: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    reference: ReferenceGuidance,
    sigmas: Tensor,
    sigma_data: float,
    gamma: float = 0.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Gamma-sampling from the noisy reference, with Langevin steps in between by the score and the loss.

        x    = x_ref + sigma_0 noise
        x    = G(x, sigma_n, s),    s = sqrt(1 - gamma^2) sigma_n+1
        x   += zeta/2 (score(x, s) - c grad L(x, x_ref + s e)) + sqrt(zeta) e',    M times
        x   += gamma sigma_n+1 e

    The loss is scaled so that features equal to the image weigh as much as a score of noise alone.

    Args:
        jump: (x, sigma [], s [], labels) -> x at s, in EDM's scale.
        denoiser: (x, sigma [], labels) -> x0; the score is (x0 - x) / sigma^2.
        noise: unit normal.  [B,C,H,W]
        sigmas: noise levels, falling, above 0; the last jump leads to 0.  [N]
        gamma: share of fresh noise, in [0, 1): at 1 the corrector would act at noise 0, where there is no score.
        randn_like: unit normal noise of the shape of its argument.
    Returns: x0 [B,C,H,W].
    Source: Kim et al. 2024 (CTM), algorithm 3.  Differs: no corrector at noise 0; zeta, which the paper leaves open, is
        Song et al.'s rule with r = 0.16, 2 (r |e'| / |score|)^2 twice, at the score of noise alone.
    """
    image = reference.image.to(noise)
    x = image + sigmas[0].to(noise) * noise
    for sigma, after in pairwise([*sigmas, torch.zeros_like(sigmas[0])]):
        s = math.sqrt(1 - gamma**2) * after
        x = jump(x, sigma, s, labels)
        if after == 0:
            break
        for _ in range(reference.correctors):
            aim = image + float(s) * randn_like(x)
            score = (denoiser(x, s, labels).to(x.dtype) - x) / float(s) ** 2
            pull = loss_gradient(reference.features, x, aim, float(s), sigma_data)
            zeta = (reference.step * float(s)) ** 2
            x = x + zeta / 2 * (score - reference.weight * pull) + math.sqrt(zeta) * randn_like(x)
        x = x + gamma * float(after) * randn_like(x)
    return x


def loss_gradient(features: Callable[[Tensor], Tensor], x: Tensor, aim: Tensor, sigma: float, sd: float) -> Tensor:
    """Returns the gradient in x of the loss of ReferenceGuidance.  [B,C,H,W]"""
    cos = sd / math.hypot(sd, sigma)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = (features(cos * x) - features(cos * aim)).square().sum() / (2 * sd**2)
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient
