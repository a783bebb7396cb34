"""Discriminators of a network's features: results of its encoder, which a score also has to know.

Each turns the features, [B,C,h,w] from every level of the encoder, into logits [B,n], above 0 for images that look
real. It is a part of a network that is trained with it, or stands beside a frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.levels import Layer
from edmdistill.torch_state import seeded

HeadKind = Literal["bottleneck", "levels", "mean"]


class ConvolutionHead(nn.Sequential):
    """One logit from convolutions: each halves the resolution, the last but one sees what is left.

    Args:
        layers: that the features come from, a level each.
        level: of the feature that is read; -1: the bottleneck.
    Source: Yin et al. 2024 (DMD2), their code for ImageNet at 64x64, whose bottleneck has 8x8 pixels.
    """

    def __init__(self, layers: Sequence[Layer], level: int = -1) -> None:
        channels, resolution = layers[level].out_channels, layers[level].resolution
        groups = next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
        convolutions = list[nn.Module]()
        while resolution > 4:
            convolutions += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            resolution //= 2
        convolutions += [nn.Conv2d(channels, channels, resolution), nn.GroupNorm(groups, channels), nn.SiLU()]
        super().__init__(*convolutions, nn.Conv2d(channels, 1, 1), nn.Flatten())
        self.level = level

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logit: Tensor = super().forward(features[self.level])  # type: ignore[no-untyped-call]
        return logit


class LevelHeads(nn.ModuleList):
    """A logit from each level, by a ConvolutionHead.  Source: FastGen's discriminator of EDM's networks."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(ConvolutionHead(layers, level) for level in range(len(layers)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(features) for head in self], 1)


class MeanHead(nn.Module):
    """A logit at each pixel of the bottleneck: the mean of the channels. It has no weights: the encoder itself learns.

    Source: Zhou et al. 2025 (SiDA), section 3.
    """

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return features[-1].mean(1).flatten(1)


HEADS: dict[HeadKind, Callable[[Sequence[Layer]], nn.Module]] = {
    "bottleneck": ConvolutionHead,
    "levels": LevelHeads,
    "mean": lambda layers: MeanHead(),
}


def make_head(flow: FlowNetwork, seed: int, kind: HeadKind) -> nn.Module:
    """Returns a head for the features of the network; the seed draws its weights."""
    with seeded(seed):
        return HEADS[kind](flow.network.feature_layers)


def add_head(flow: FlowNetwork, kind: HeadKind, seed: int) -> None:
    """Gives the network a head, which no checkpoint keeps."""
    flow.network.head = make_head(flow, seed, kind).to(flow.dtype)
