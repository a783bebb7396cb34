"""Discriminators of a network's bottleneck: the result of its encoder, which a score also has to know.

Each turns the bottleneck [B,C,h,w] into logits [B,n], above 0 for images that look real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.levels import Layer

HeadKind = Literal["convolutions", "mean"]


class ConvolutionHead(nn.Sequential):
    """One logit from convolutions: each halves the resolution, the last but one sees what is left.

    Args:
        resolution: of the bottleneck.
    Source: Yin et al. 2024 (DMD2), their code for ImageNet at 64x64, whose bottleneck has 8x8 pixels.
    """

    def __init__(self, channels: int, resolution: int) -> None:
        groups, layers = max(1, min(32, channels // 4)), list[nn.Module]()
        while resolution > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            resolution //= 2
        layers += [nn.Conv2d(channels, channels, resolution), nn.GroupNorm(groups, channels), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(channels, 1, 1), nn.Flatten())


class MeanHead(nn.Module):
    """A logit at each pixel: the mean of the channels. It has no weights: the encoder itself learns to judge.

    Source: Zhou et al. 2025 (SiDA), section 3.
    """

    def forward(self, bottleneck: Tensor) -> Tensor:
        return bottleneck.mean(1).flatten(1)


HEADS: dict[HeadKind, Callable[[Layer], nn.Module]] = {
    "convolutions": lambda bottleneck: ConvolutionHead(bottleneck.out_channels, bottleneck.resolution),
    "mean": lambda bottleneck: MeanHead(),
}


def add_head(flow: FlowNetwork, kind: HeadKind, seed: int) -> None:
    """Gives the network a head, whose weights the seed draws; no checkpoint keeps it."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(seed)
        flow.network.head = HEADS[kind](flow.network.bottleneck).to(flow.dtype)
