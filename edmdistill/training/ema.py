"""The moving average of a network's weights: what sampling uses."""

from __future__ import annotations

import copy

import torch

from edmdistill.networks.preconditioning import FlowNetwork
from edmdistill.training.engine import local


class Ema:
    """The average over all steps so far, whose weights halve every `half_life_images` images.

        average <- beta average + (1 - beta) weights,    beta = 0.5^(batch / half_life)

    Attributes:
        network: the average, a network in eval mode.
    Args:
        network: what is averaged; copied.
        half_life_images: how many images ago a step counts half.
        rampup_ratio: at the start the half-life is this share of the images seen, so that the initial weights are
            forgotten soon; None: the full half-life from the start.
    Source: EDM, training_loop.py, "Update EMA".
    """

    name = "half-life"

    def __init__(self, network: FlowNetwork, half_life_images: int, rampup_ratio: float | None) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life_images = half_life_images
        self.rampup_ratio = rampup_ratio

    def beta(self, images: int, batch: int) -> float:
        """The share of the old average.  images: seen before this step."""
        half_life = float(self.half_life_images)
        if self.rampup_ratio is not None:
            half_life = min(half_life, images * self.rampup_ratio)
        return float(0.5 ** (batch / max(half_life, 1e-8)))

    @torch.no_grad()
    def update(self, network: FlowNetwork, images: int, batch: int) -> None:
        """Takes a step of `batch` images into the average; `images` were seen before it."""
        average, weights = [local(p) for p in self.network.parameters()], [local(p) for p in network.parameters()]
        torch._foreach_lerp_(average, weights, 1 - self.beta(images, batch))
        for mine, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(buffer)
