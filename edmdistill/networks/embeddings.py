"""Embeddings of noise levels, times and guidance weights by sines and cosines."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from edmdistill.kernels.linear import linear
from edmdistill.networks.initial import normal


class PositionalEmbedding(nn.Module):
    """Frequencies from 1 down to 1/10000 in geometric steps.  c_noise [B] -> [B,channels]

    Args:
        endpoint: whether 1/10000 is included: it is in DDPM++; ADM stops one step before.
        sin_first: whether sines come before cosines, as in DDPM++; in ADM the cosines come first.
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
        self.register_buffer("freqs", normal(channels // 2, std=16))

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * (2 * math.pi * self.freqs).to(c_noise.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Slow sines and cosines of t, mixed by a linear map.  c_noise = t [B] -> [B,channels]

    It replaces the network's features of c_noise; the layers after them do not change.

    Source: sCM, section 4.1.  Differs: frequencies from 4 down, where the paper's positional embedding starts at about
    1; and the map, which can be fitted to the features of a pretrained network (`networks.surgery.adapt`). On the
    digits' teacher, the fit at frequency 1 multiplies the loss at sigma .8 by 2.8; at 4 it adds at most 3 % anywhere.
    """

    FEATURES = 64
    FREQUENCY = 4.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positional = PositionalEmbedding(self.FEATURES)
        self.mix = nn.Linear(self.FEATURES, channels, bias=False)
        unit_out = math.sqrt(2 / self.FEATURES)
        self.mix.weight = nn.Parameter(normal(channels, self.FEATURES, std=unit_out))

    def features(self, t: Tensor) -> Tensor:
        """Returns the sines and cosines before the map.  [B] -> [B,FEATURES]"""
        features: Tensor = self.positional(self.FREQUENCY * t)
        return features

    def forward(self, t: Tensor) -> Tensor:
        # Called as a layer: an offloaded network brings the weights of the layers that are called.
        mixed: Tensor = self.mix(self.features(t))
        return mixed


class GuidanceEmbedding(nn.Module):
    """Sines and cosines of the guidance weight, mixed by a linear map.  w [B] -> [B,channels]

    The map starts at 0: adding it to a network changes no output, for any w, but its gradient is not 0.

    Source: sCM, appendix G.2, which does not give the initialization.
    """

    FEATURES = 64
    FREQUENCY = 4.0
    """The highest frequency: w = 1 and w = 2 are 4 radians apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positional = PositionalEmbedding(self.FEATURES)
        self.weight = nn.Parameter(torch.zeros(channels, self.FEATURES))

    def forward(self, w: Tensor) -> Tensor:
        return linear(self.positional(self.FREQUENCY * w), self.weight)


class SecondTime(nn.Module):
    """Copies of the layers that embed the time, under the same names, and a gain that starts at 0."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, copy.deepcopy(network.get_submodule(name)))
        self.gain = nn.Parameter(torch.zeros([]))
