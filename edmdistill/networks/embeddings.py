"""Sines and cosines of the noise condition, for DDPM++, NCSN++ and ADM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Frequencies from 1 down to 1/10000 in geometric steps.  c_noise [B] -> [B,channels]

    Args:
        endpoint: whether 1/10000 itself is reached: DDPM++ reaches it, ADM stops one step before.
        sin_first: sines before cosines, as in DDPM++; ADM puts the cosines first.
    """

    def __init__(self, channels: int, endpoint: bool = False, sin_first: bool = False) -> None:
        super().__init__()
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
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * (2 * math.pi * self.freqs).to(c_noise.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)
