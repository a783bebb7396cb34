"""Heun's method on EDM's probability-flow ODE, deterministic or with churn: how teachers are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from edmdistill.arguments import require_fields
from edmdistill.errors import EdmDistillError
from edmdistill.schedules import edm_sigmas
from edmdistill.transfer import to_device


class ODEDenoiser(Protocol):
    """The interface of a teacher for the solvers: a Denoiser has it, and so has a GuidedDenoiser."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    def round_sigma(self, sigma: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Churn:
    """Fresh noise in Heun's method, EDM's stochastic sampler; the defaults add none.  Source: EDM, algorithm 2.

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
        require_fields(self)
        for name, most in (("strength", 1e4), ("sigma_min", 1e6), ("sigma_max", math.inf), ("inflation", 10.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise EdmDistillError(f"the churn's {name} must be in [0, {most:g}], but it is {value:g}")
        if self.sigma_min > self.sigma_max:
            raise EdmDistillError(
                f"the churn's sigma_min {self.sigma_min:g} is above its sigma_max {self.sigma_max:g}, so that it would "
                "add no noise: give the lower level as sigma_min"
            )


@dataclass(frozen=True)
class OfficialSampler:
    """The differences between the official samplers of EDM and of EDM2.

    Attributes:
        num_steps: default number of steps.
        dtype: of the noise levels, and of the state between two network calls.
        clamps: the noise levels are clamped to the network's range.
        always_draws: with churn, each step takes noise from the seed's stream, even where churn adds none.
    """

    num_steps: int
    dtype: torch.dtype
    clamps: bool
    always_draws: bool

    def sigmas(
        self,
        denoiser: ODEDenoiser,
        num_steps: int | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> Tensor:
        """Returns EDM's grid at levels that the network supports, followed by 0.  [num_steps + 1] of `dtype`"""
        if self.clamps:
            sigma_min, sigma_max = max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)
        grid = edm_sigmas(num_steps or self.num_steps, sigma_min, sigma_max).to(self.dtype)
        return torch.cat([denoiser.round_sigma(grid), grid.new_zeros(1)])


EDM_SAMPLER = OfficialSampler(num_steps=18, dtype=torch.float64, clamps=True, always_draws=True)
EDM2_SAMPLER = OfficialSampler(num_steps=32, dtype=torch.float32, clamps=False, always_draws=False)


def edm_sampler(
    denoiser: ODEDenoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    sigmas: Tensor,
    churn: Churn = Churn(),
    always_draws: bool = True,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Solves dx/dsigma = (x - D(x; sigma)) / sigma by Heun's method, in 2n - 1 calls of the denoiser for n steps.

    Args:
        denoiser: (x, sigma [], labels) -> x0.
        noise: unit normal.  [B,C,H,W]
        labels: passed to the denoiser.
        sigmas: noise levels, falling, followed by 0, on the CPU; see OfficialSampler.sigmas.  [n + 1]
        churn, always_draws: see Churn and OfficialSampler.
        randn_like: unit normal noise of the shape of its argument.
    Returns: x0 [B,C,H,W], in the dtype of sigmas.
    Source: Karras et al. 2022 (EDM), algorithm 2; its official form of 2022 and that of EDM2.
    Differs: noise levels are formed in float64 and then rounded to the sampler's dtype; one step is allowed.
    """
    levels, sigmas = sigmas, to_device(sigmas, noise.device)  # the host decides by its own numbers, and waits for none
    x = noise.to(sigmas.dtype) * sigmas[0]
    for (level, level_next), (sigma, sigma_next) in zip(pairwise(levels), pairwise(sigmas), strict=True):
        # Raise the noise level.
        churned = churn.strength > 0 and churn.sigma_min <= level <= churn.sigma_max
        if churned or (always_draws and churn.strength > 0):
            share = min(churn.strength / (len(sigmas) - 1), math.sqrt(2) - 1) if churned else 0.0
            raised = denoiser.round_sigma(sigma + share * sigma)
            x = x + (raised**2 - sigma**2).sqrt() * churn.inflation * randn_like(x)
            sigma = raised

        # Euler's step.
        slope = (x - denoiser(x, sigma, labels).to(x.dtype)) / sigma
        ahead = x + (sigma_next - sigma) * slope

        # Its correction with the slope at the other end.
        if level_next > 0:
            slope_ahead = (ahead - denoiser(ahead, sigma_next, labels).to(x.dtype)) / sigma_next
            ahead = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_ahead)
        x = ahead
    return x
