"""Sines and cosines of the noise condition, for DDPM++, NCSN++ and ADM; and of the time itself, for all."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from edmdistill.kernels.linear import linear


class PositionalEmbedding(nn.Module):
    """Frequencies from 1 down to 1/10000 in geometric steps.  c_noise [B] -> [B,channels]

    Args:
        endpoint: whether 1/10000 itself is reached: DDPM++ reaches it, ADM stops one step before.
        sin_first: sines before cosines, as in DDPM++; ADM puts the cosines first.
    """

    def __init__(self, channels: int, endpoint: bool = False, sin_first: bool = False) -> None:
        super().__init__()
        if channels % 2 or channels < 4:
            raise ValueError(f"the time embedding has {channels} channels, but must have an even number of at least 4")
        self.channels = channels
        self.endpoint = endpoint
        self.sin_first = sin_first

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.channels // 2
        # float32 in a float64 network too: the frequencies are the official ones.
        exponents = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - self.endpoint)
        angle = c_noise[:, None] * ((1 / 10000) ** exponents).to(c_noise.dtype)
        return torch.cat([angle.sin(), angle.cos()] if self.sin_first else [angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """NCSN++'s random frequencies, of standard deviation 16; sines first.  c_noise [B] -> [B,channels]"""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"the time embedding has {channels} channels, but must have an even number")
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * (2 * math.pi * self.freqs).to(c_noise.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Slow sines and cosines of t, mixed by a linear map.  c_noise = t [B] -> [B,channels]

    It stands where the network's own features of c_noise are, so that all that follows stays as it is.

    Source: sCM, section 4.1.  Differs: frequencies from 4 down, where the paper's positional embedding begins at about
    1, and the map, by which the features of a pretrained network can be imitated (`networks.adapt`). At a frequency of
    1 the digits' teacher loses up to 2.8 times its loss at sigma .8 by that, at 4 not more than 3 % at any noise level.
    """

    FEATURES = 64
    FREQUENCY = 4.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positional = PositionalEmbedding(self.FEATURES)
        self.mix = nn.Linear(self.FEATURES, channels, bias=False)
        nn.init.normal_(self.mix.weight, std=math.sqrt(2 / self.FEATURES))  # unit variance out

    def features(self, t: Tensor) -> Tensor:
        """What is mixed.  [B] -> [B,FEATURES]"""
        features: Tensor = self.positional(self.FREQUENCY * t)
        return features

    def forward(self, t: Tensor) -> Tensor:
        # Called as a layer: of a network that is lent, only what is called has its weights here.
        mixed: Tensor = self.mix(self.features(t))
        return mixed


class GuidanceEmbedding(nn.Module):
    """Sines and cosines of the weight of guidance, and a linear map of them.  w [B] -> [B,channels]

    The map starts at 0: a network to which this is added stays as it is, for any w, and its gradient is not 0.

    Source: sCM, appendix G.2.  Differs: the start; the paper does not say how it starts.
    """

    FEATURES = 64
    FREQUENCY = 4.0
    """Of the fastest: w = 1 and w = 2 are 4 radians apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positional = PositionalEmbedding(self.FEATURES)
        self.weight = nn.Parameter(torch.zeros(channels, self.FEATURES))

    def forward(self, w: Tensor) -> Tensor:
        return linear(self.positional(self.FREQUENCY * w), self.weight)


class SecondTime(nn.Module):
    """Copies of the layers that embed the time, under the network's own names for them, and the gain."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, copy.deepcopy(network.get_submodule(name)))
        self.gain = nn.Parameter(torch.zeros([]))
