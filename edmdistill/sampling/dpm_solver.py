"""DDIM and the second-order DPM-Solvers: alternatives to Heun's method for a teacher's probability-flow ODE.

All are written in terms of the denoiser, in EDM's scale x = x_t / cos(t), where their coefficients are ratios of noise
levels; they compute the same as the paper's TrigFlow forms. Signature and loop are those of edm_sampler.

Source: Lu & Song 2025 (sCM), appendix B.1, eq. 26-28.  Differs: eq. 26 has x_t for x_s on its right side.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from edmdistill.sampling.heun import ODEDenoiser
from edmdistill.transfer import to_device


def ddim_sampler(denoiser: ODEDenoiser, noise: Tensor, labels: Tensor | None = None, *, sigmas: Tensor) -> Tensor:
    """Holds the denoised image over a step: first order, one call of the denoiser a step.

    Args, Returns: as edm_sampler's.
    Source: Song et al. 2021 (DDIM), eq. 12 with sigma 0; sCM, eq. 26.
    """
    sigmas = to_device(sigmas, noise.device)
    x = noise.to(sigmas.dtype) * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoiser(x, sigma, labels).to(x.dtype)
        x = x0 + sigma_next / sigma * (x - x0)
    return x


def dpm_solver_2s(
    denoiser: ODEDenoiser, noise: Tensor, labels: Tensor | None = None, *, sigmas: Tensor, midpoint: float = 0.5
) -> Tensor:
    """Holds the predicted noise over a step, corrected by its value at a point inside: second order, single-step.

    Two calls of the denoiser a step, except for the last, to 0, which is of first order.

    Args, Returns: as edm_sampler's.
        midpoint: position of that point in ln(sigma), in (0, 1]; 1, the end of the step, is Heun's method.
    Source: Lu et al. 2022 (DPM-Solver), algorithm 1; sCM, eq. 27.
    """
    levels, sigmas = sigmas, to_device(sigmas, noise.device)
    x = noise.to(sigmas.dtype) * sigmas[0]
    for (sigma, sigma_next), level_next in zip(pairwise(sigmas), levels[1:], strict=True):
        n = (x - denoiser(x, sigma, labels).to(x.dtype)) / sigma
        if level_next > 0:
            middle = denoiser.round_sigma(sigma ** (1 - midpoint) * sigma_next**midpoint)
            ahead = x + (middle - sigma) * n
            n_ahead = (ahead - denoiser(ahead, middle, labels).to(x.dtype)) / middle
            n = n + (n_ahead - n) / (2 * midpoint)
        x = x + (sigma_next - sigma) * n
    return x


def dpm_solver_pp_2m(denoiser: ODEDenoiser, noise: Tensor, labels: Tensor | None = None, *, sigmas: Tensor) -> Tensor:
    """Extrapolates the denoised image from the step before: second order, multistep.

    One call of the denoiser a step; the first step and the last, to 0, are DDIM's.

    Args, Returns: as edm_sampler's.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; sCM, eq. 28.
    """
    levels, sigmas = sigmas, to_device(sigmas, noise.device)
    x = noise.to(sigmas.dtype) * sigmas[0]
    previous: tuple[Tensor, Tensor] | None = None
    for (sigma, sigma_next), level_next in zip(pairwise(sigmas), levels[1:], strict=True):
        x0 = denoiser(x, sigma, labels).to(x.dtype)
        ahead = x0
        if previous is not None and level_next > 0:
            sigma_previous, x0_previous = previous
            r = (sigma_previous / sigma).log() / (sigma / sigma_next).log()
            ahead = x0 + (x0 - x0_previous) / (2 * r)
        x = ahead + sigma_next / sigma * (x - ahead)
        previous = sigma, x0
    return x
