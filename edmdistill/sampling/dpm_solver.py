"""DDIM and the DPM-Solvers of second order: other ways than Heun's to solve a teacher's probability-flow ODE.

All are written with the denoiser, in EDM's scale x = x_t / cos(t), where their coefficients are ratios of noise levels;
what they compute is what the paper's TrigFlow forms compute. Signature and loop are Heun's.

Source: Lu & Song 2025 (sCM), appendix B.1, eq. 26-28.  Differs: eq. 26 has x_t for x_s on its right side.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from edmdistill.sampling.heun import EDM, Denoises, Style, noise_levels


def ddim_sampler(
    denoiser: Denoises,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    style: Style = EDM,
    num_steps: int | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """First order: the denoised image is held over a step. num_steps calls of the denoiser.

    Args, Returns: as edm_sampler's.
    Source: Song et al. 2021 (DDIM), eq. 12 with sigma 0; sCM, eq. 26.
    """
    levels = noise_levels(denoiser, style, num_steps or style.num_steps, sigma_min, sigma_max, rho).to(noise.device)
    x = noise.to(style.dtype) * levels[0]
    for sigma, sigma_next in pairwise(levels):
        x0 = denoiser(x, sigma, labels).to(style.dtype)
        x = x0 + sigma_next / sigma * (x - x0)
    return x


def dpm_solver_2s(
    denoiser: Denoises,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    style: Style = EDM,
    num_steps: int | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    midpoint: float = 0.5,
) -> Tensor:
    """Second order in single steps: the noise is held, then corrected by what it is at a point on the way.

    2 num_steps - 1 calls of the denoiser, for the last step, to 0, is of first order.

    Args, Returns: as edm_sampler's.
        midpoint: where that point lies in ln(sigma), (0, 1]; 1, the step's end, is Heun's method.
    Source: Lu et al. 2022 (DPM-Solver), algorithm 1; sCM, eq. 27.
    """
    levels = noise_levels(denoiser, style, num_steps or style.num_steps, sigma_min, sigma_max, rho).to(noise.device)
    x = noise.to(style.dtype) * levels[0]
    for sigma, sigma_next in pairwise(levels):
        n = (x - denoiser(x, sigma, labels).to(style.dtype)) / sigma
        if sigma_next > 0:
            middle = style.rounded(denoiser, sigma ** (1 - midpoint) * sigma_next**midpoint)
            ahead = x + (middle - sigma) * n
            n_ahead = (ahead - denoiser(ahead, middle, labels).to(style.dtype)) / middle
            n = n + (n_ahead - n) / (2 * midpoint)
        x = x + (sigma_next - sigma) * n
    return x


def dpm_solver_pp_2m(
    denoiser: Denoises,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    style: Style = EDM,
    num_steps: int | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Second order in many steps: the denoised image is continued along its change since the step before.

    num_steps calls of the denoiser; the first step and the last, to 0, are DDIM's.

    Args, Returns: as edm_sampler's.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; sCM, eq. 28.
    """
    levels = noise_levels(denoiser, style, num_steps or style.num_steps, sigma_min, sigma_max, rho).to(noise.device)
    x, last = noise.to(style.dtype) * levels[0], None
    for sigma, sigma_next in pairwise(levels):
        x0 = denoiser(x, sigma, labels).to(style.dtype)
        ahead = x0
        if last is not None and sigma_next > 0:
            sigma_last, x0_last = last
            r = (sigma_last / sigma).log() / (sigma / sigma_next).log()
            ahead = x0 + (x0 - x0_last) / (2 * r)
        x, last = ahead + sigma_next / sigma * (x - ahead), (sigma, x0)
    return x
