"""EDM2's layers: convolutions with weights normalized in every forward pass, and random Fourier features.

Parameter and buffer names are the official ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edmdistill.kernels.linear import conv2d, linear
from edmdistill.kernels.magnitude import mp_conv, mp_fourier, normalize_weight
from edmdistill.networks.initial import normal

GAIN_LAYERS = {"emb_gain": "emb_linear", "out_gain": "out_conv"}
"""EDM2's gains, and the layer that each scales."""


class MPConv(nn.Module):
    """Magnitude-preserving convolution (kernel 1, 3, ...) or linear map (None).  Source: EDM2, eq. 47, 66."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | None = None) -> None:
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(normal(out_channels, in_channels, *size))
        self.folded = False

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        if self.folded:
            return linear(x, self.weight) if self.weight.ndim == 2 else conv2d(x, self.weight)
        return mp_conv(x, normalize_weight(self.weight), gain)

    @torch.no_grad()
    def normalize_(self) -> None:
        self.weight.copy_(normalize_weight(self.weight))

    @torch.no_grad()
    def fold_(self, gain: Tensor | float = 1.0) -> None:
        """Folds normalization and gain into the weight, and makes the layer a plain convolution or linear map.

        The output does not change but for rounding; a gain passed later has no effect.
        """
        if not self.folded:
            self.normalize_()
            self.weight.mul_(gain / math.sqrt(self.weight[0].numel()))
        self.weight.requires_grad_(False)
        self.folded = True


class MPFourier(nn.Module):
    """Random Fourier features of c_noise.  [B] -> [B,channels]  Source: EDM2, eq. 75."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", normal(channels, std=2 * math.pi))
        self.register_buffer("phases", torch.empty(channels).uniform_().mul_(2 * math.pi))

    def forward(self, c_noise: Tensor) -> Tensor:
        return mp_fourier(c_noise, self.freqs, self.phases)
