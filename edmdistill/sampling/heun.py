"""Heun's method on EDM's probability-flow ODE, deterministic or with churn: how teachers are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.schedules import edm_sigmas


class Denoises(Protocol):
    """What the sampler asks of a teacher: a Denoiser has it, and so has a guided one."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    def round_sigma(self, sigma: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Churn:
    """Fresh noise on the way.  Source: EDM, algorithm 2; the defaults add none.

    Attributes:
        strength: S_churn; a step raises sigma by the share min(strength / num_steps, sqrt(2) - 1).
        sigma_min, sigma_max: S_min and S_max, the levels at which noise is added.
        inflation: S_noise, the standard deviation of the added noise, at most 10.
    Raises: EdmDistillError: a value out of range.
    """

    strength: float = 0.0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    inflation: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("strength", 1e4), ("sigma_min", 1e6), ("sigma_max", math.inf), ("inflation", 10.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise EdmDistillError(f"the churn's {name} lies in [0, {most:g}], but it is {value:g}")


@dataclass(frozen=True)
class Style:
    """Where the official samplers of EDM and of EDM2 differ.

    Attributes:
        num_steps: default number of steps.
        dtype: of the noise levels and of the state between two network calls.
        fits_network: the noise levels are clamped to the network's range and rounded to the levels that it knows.
        always_draws: a step takes noise from the seed's stream even where the churn adds none.
    """

    num_steps: int
    dtype: torch.dtype
    fits_network: bool
    always_draws: bool

    def rounded(self, denoiser: Denoises, sigma: Tensor) -> Tensor:
        """The noise level at which the denoiser is called for sigma."""
        return denoiser.round_sigma(sigma) if self.fits_network else sigma


EDM = Style(num_steps=18, dtype=torch.float64, fits_network=True, always_draws=True)
EDM2 = Style(num_steps=32, dtype=torch.float32, fits_network=False, always_draws=False)


def steps_of_nfe(nfe: int) -> int:
    """The Heun steps that take nfe network evaluations: n steps take 2n - 1, since the last one is Euler's.

    Raises: EdmDistillError: nfe is not odd and positive.
    """
    if nfe < 1 or nfe % 2 == 0:
        near = f"{nfe - 1} or {nfe + 1}" if nfe > 1 else "1, 3, 5 ..."
        raise EdmDistillError(
            f"a teacher takes an odd number of network evaluations, 2n - 1 for n steps, not {nfe}: ask for {near}"
        )
    return (nfe + 1) // 2


def noise_levels(
    denoiser: Denoises, style: Style, num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """EDM's grid as the style has it, and 0 behind it.  [num_steps + 1], in the dtype of the style"""
    if style.fits_network:
        sigma_min, sigma_max = max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)
    levels = style.rounded(denoiser, edm_sigmas(num_steps, sigma_min, sigma_max, rho).to(style.dtype))
    return torch.cat([levels, levels.new_zeros(1)])


def edm_sampler(
    denoiser: Denoises,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    style: Style = EDM,
    num_steps: int | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    churn: Churn = Churn(),
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Solves dx/dsigma = (x - D(x; sigma)) / sigma from sigma_max to 0 in 2 num_steps - 1 calls of the denoiser.

    Args:
        denoiser: (x, sigma [], labels) -> x0.
        noise: unit normal.  [B,C,H,W]
        labels: handed to the denoiser.
        style: EDM or EDM2, see Style.
        num_steps: default as the style says.
        randn_like: unit normal noise of the shape of its argument.
    Returns: x0 [B,C,H,W], in the dtype of the style.
    Source: Karras et al. 2022 (EDM), algorithm 2; its official form of 2022 and that of EDM2.
    Differs: noise levels are formed in float64 and then rounded to the style's dtype; one step is allowed.
    """
    num_steps = num_steps or style.num_steps
    levels = noise_levels(denoiser, style, num_steps, sigma_min, sigma_max, rho).to(noise.device)
    x = noise.to(style.dtype) * levels[0]
    for sigma, sigma_next in pairwise(levels):
        # Raise the noise level.
        churned = churn.strength > 0 and churn.sigma_min <= sigma <= churn.sigma_max
        if churned or style.always_draws:
            share = min(churn.strength / num_steps, math.sqrt(2) - 1) if churned else 0.0
            raised = style.rounded(denoiser, sigma + share * sigma)
            x = x + (raised**2 - sigma**2).sqrt() * churn.inflation * randn_like(x)
            sigma = raised

        # Euler's step.
        slope = (x - denoiser(x, sigma, labels).to(style.dtype)) / sigma
        ahead = x + (sigma_next - sigma) * slope

        # Its correction with the slope at the other end.
        if sigma_next > 0:
            slope_ahead = (ahead - denoiser(ahead, sigma_next, labels).to(style.dtype)) / sigma_next
            ahead = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_ahead)
        x = ahead
    return x
