"""The moving averages of a network's weights: what sampling uses.

average <- beta average + (1 - beta) weights
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from edmdistill.checkpoints.posthoc_ema import power_function_beta, sigma_rel_to_gamma
from edmdistill.machine.engine import local_shard
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.schema import EmaTable
from edmdistill.transfer import staged


class HalfLife(NamedTuple):
    """A step's weight halves every `half_life_images` images: beta = 0.5^(batch / half_life).

    Attributes:
        rampup_ratio: the half-life is at most this share of the images seen, so that the initial weights are forgotten
            soon; None: the full half-life from the start.
    Source: EDM, training_loop.py, "Update EMA".
    """

    half_life_images: int
    rampup_ratio: float | None

    @property
    def name(self) -> str:
        return "half-life"

    def beta(self, images: int, batch: int) -> float:
        """Returns the weight of the old average.  images: seen before this step."""
        half_life = float(self.half_life_images)
        if self.rampup_ratio is not None:
            half_life = min(half_life, images * self.rampup_ratio)
        return float(0.5 ** (batch / max(half_life, 1e-8)))


class PowerFunction(NamedTuple):
    """A step's weight is proportional to a power of its time; see posthoc_ema.py.  Source: EDM2, section 3."""

    sigma_rel: float

    @property
    def name(self) -> str:
        return f"sigma-rel-{self.sigma_rel:.3f}"

    def beta(self, images: int, batch: int) -> float:
        """Returns the weight of the old average.  images: seen before this step."""
        return power_function_beta(images, batch, sigma_rel_to_gamma(self.sigma_rel))


def profiles(table: EmaTable) -> list[HalfLife | PowerFunction]:
    """Returns the profiles of a recipe's averages. Sampling uses the first."""
    ratio = None if table.rampup_ratio == "none" else table.rampup_ratio
    half_lives = [] if table.half_life_images is None else [HalfLife(table.half_life_images, ratio)]
    return [*half_lives, *map(PowerFunction, table.sigma_rel)]


class Ema:
    """An average over all steps so far.

    Attributes:
        network: the average, in eval mode. It may be in the host's memory while the averaged network is on a GPU.
    Args:
        network: the network to average; copied.
    """

    def __init__(self, network: FlowNetwork, profile: HalfLife | PowerFunction) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.profile = profile

    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """Updates the average after a step of `batch` images; `images` were seen before it."""
        update_average(self.network, network, self.profile.beta(images, batch))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, beta: float) -> None:
    """average <- beta average + (1 - beta) weights, shard by shard; buffers are copied."""
    old = [local_shard(parameter) for parameter in average.parameters()]
    targets = [*old, *average.buffers()]
    moved = [*map(local_shard, network.parameters()), *network.buffers()]
    for first, some in staged(moved) if targets and targets[0].device.type == "cpu" else [(0, moved)]:
        count = min(max(0, len(old) - first), len(some))  # of them are weights
        if count:
            torch._foreach_lerp_(targets[first : first + count], some[:count], 1 - beta)
        for target, buffer in zip(targets[first + count :], some[count:], strict=False):
            target.copy_(buffer)
