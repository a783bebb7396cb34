"""Denoisers that are functions, for the tests of samplers."""

from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = 0.5


class ToyDenoiser:
    """A denoiser as a plain function, which notes the images and noise levels that it was given."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.images: list[Tensor] = []
        self.sigmas: list[Tensor] = []

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        assert sigma.shape == ()
        self.images.append(x)
        self.sigmas.append(sigma)
        return self.function(x, sigma)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of data N(0, SIGMA_DATA^2)."""
    return x * SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of the golden toy samplers."""
    return gaussian(x, sigma) + 0.1 * torch.sin(3 * x)
