"""Linear maps, resampling and attention.

Images are [B,C,H,W]. Every function gives back the dtype of its first argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as f
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.  x [B,N], weight [M,N], bias [M] -> [B,M]"""
    return f.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution that keeps the resolution (odd kernel, zero padding).  weight [M,C,k,k] -> [B,M,H,W]"""
    bias = None if bias is None else bias.to(x.dtype)
    return f.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)


def _separable(taps: Sequence[float], x: Tensor) -> Tensor:
    kernel = torch.tensor(taps, dtype=torch.float32, device=x.device)
    kernel = kernel.outer(kernel) / kernel.sum() ** 2
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


def downsample(x: Tensor, taps: Sequence[float] = (1, 1)) -> Tensor:
    """Halves the resolution with a separable low-pass filter of an even number of taps.  [B,C,H,W] -> [B,C,H/2,W/2]"""
    if len(taps) == 2 and taps[0] == taps[1]:  # the box filter has a fast name
        return f.avg_pool2d(x, 2)
    return f.conv2d(x, _separable(taps, x), groups=x.shape[1], stride=2, padding=(len(taps) - 1) // 2)


def upsample(x: Tensor, taps: Sequence[float] = (1, 1)) -> Tensor:
    """Doubles the resolution with a separable filter of an even number of taps.  [B,C,H,W] -> [B,C,2H,2W]"""
    if len(taps) == 2 and taps[0] == taps[1]:
        return f.interpolate(x, scale_factor=2, mode="nearest")
    kernel = _separable(taps, x) * 4
    return f.conv_transpose2d(x, kernel, groups=x.shape[1], stride=2, padding=(len(taps) - 1) // 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32.  q [B,heads,L,D], k and v [B,heads,Lk,D] -> [B,heads,L,D]"""
    return f.scaled_dot_product_attention(q, k, v)
