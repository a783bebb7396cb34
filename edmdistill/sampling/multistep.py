"""Multistep solvers of a teacher's probability-flow ODE that look further back than the DPM-Solver++ of second order.

They are written in EDM's scale x = x_t / cos(t), as `dpm_solver`'s. Signature and loop are those of edm_sampler; each
step is one call of the denoiser, and the last step, to 0, is DDIM's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from edmdistill.sampling.heun import ODEDenoiser
from edmdistill.transfer import to_device

ADAMS_BASHFORTH = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm_sampler(denoiser: ODEDenoiser, noise: Tensor, labels: Tensor | None = None, *, sigmas: Tensor) -> Tensor:
    """Extrapolates the slope dx/dsigma from up to three steps before, as if all were equally long.

    Fourth order on equal steps alone; on EDM's grid first order, but with small errors in few steps.

    Args, Returns: as edm_sampler's.
    Source: Zhang & Chen 2023 (DEIS), appendix H.2, iPNDM: Liu et al. 2022 (PNDM) without the Runge-Kutta steps.
    """
    levels, sigmas = sigmas, to_device(sigmas, noise.device)
    x = noise.to(sigmas.dtype) * sigmas[0]
    slopes: list[Tensor] = []  # the newest first
    for (sigma, sigma_next), level_next in zip(pairwise(sigmas), levels[1:], strict=True):
        slope = (x - denoiser(x, sigma, labels).to(x.dtype)) / sigma
        slopes = [slope, *slopes[:3]] if level_next > 0 else [slope]
        weights = ADAMS_BASHFORTH[len(slopes)]
        x = x + (sigma_next - sigma) * sum(weight * each for weight, each in zip(weights, slopes, strict=True))
    return x


def unipc_sampler(
    denoiser: ODEDenoiser, noise: Tensor, labels: Tensor | None = None, *, sigmas: Tensor, order: int = 3
) -> Tensor:
    """Integrates a polynomial through the denoised images of the last steps, and corrects each step by its own end.

    A step is predicted from `order` denoised images, or as many as there are. The denoised image at its end, which the
    next step needs anyway, then gives a polynomial of one degree more, by which the step is taken again. In the last
    steps the order falls to 1, as in the official code by default.

    Args, Returns: as edm_sampler's.
        order: of the predictor, at least 1; the corrector's is one more.
    Source: Zhao et al. 2023 (UniPC), algorithms 1 and 2, with B(h) = e^h - 1 (bh2), in the images' own terms.
    """
    num_steps, lambdas = len(sigmas) - 1, -sigmas[:-1].double().log()  # ln(1/sigma), by the host's own numbers
    sigmas = to_device(sigmas, noise.device)

    def step(x: Tensor, n: int, images: Sequence[Tensor], nodes: Sequence[int]) -> Tensor:
        """Takes x from level n to n + 1, by the denoised image at level n and those at other levels, the nodes."""
        h = float(lambdas[n + 1] - lambdas[n])
        ratios = [float(lambdas[node] - lambdas[n]) / h for node in nodes]
        first, *others = images
        ahead = first
        for weight, image in zip(bh2_weights(ratios, h), others, strict=True):
            ahead = ahead + weight * (image - first)
        return ahead + sigmas[n + 1] / sigmas[n] * (x - ahead)

    x = noise.to(sigmas.dtype) * sigmas[0]
    images: list[Tensor] = []  # the newest first
    start, used = x, 0  # where the step before began, and how many images predicted its end
    for n in range(num_steps):
        image = denoiser(x, sigmas[n], labels).to(x.dtype)
        if n == num_steps - 1:
            return image  # DDIM's step to 0
        if n > 0:
            x = step(start, n - 1, [*images[:used], image], [*range(n - 2, n - 1 - used, -1), n])
        images = [image, *images[: order - 1]]
        start, used = x, min(order, n + 1, num_steps - n)
        x = step(x, n, images[:used], range(n - 1, n - used, -1))
    return x


def bh2_weights(ratios: Sequence[float], h: float) -> list[float]:
    """Returns the weights of other denoised images, as differences from the first, in what takes the first one's place.

    They integrate polynomials of degree len(ratios) exactly; a single one is that of DPM-Solver++(2M).

    Args:
        ratios: distance of each image from the step's start, over h; 1 is its end.
        h: length of the step in ln(1/sigma), above 0.
    Source: UniPC, eq. 5 and section 3.4, for B(h) = e^h - 1.
    """
    if len(ratios) == 1:
        return [0.5 / ratios[0]]
    # h times the integral of e^((r - 1) h) r^k over r in [0, 1], by parts
    first = moment = -math.expm1(-h)
    moments = [moment := 1 - k / h * moment for k in range(1, len(ratios) + 1)]
    powers = [[ratio**k for ratio in ratios] for k in range(1, len(ratios) + 1)]
    return (np.linalg.solve(powers, moments) / first).tolist() if ratios else []
