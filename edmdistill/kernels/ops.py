"""Linear maps, resampling, group norm and attention.

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


def is_box(taps: Sequence[float]) -> bool:
    """Whether the filter is the mean of two neighbours, which needs no convolution."""
    return len(taps) == 2 and taps[0] == taps[1]


def separable(taps: Sequence[float]) -> Tensor:
    """The low-pass filter taps x taps, of sum 1.  An even number k of taps -> [1,1,k,k] float32"""
    kernel = torch.tensor(taps, dtype=torch.float32)
    return (kernel.outer(kernel) / kernel.sum() ** 2)[None, None]


def downsample(x: Tensor, kernel: Tensor | None = None, border: bool = True) -> Tensor:
    """Halves the resolution.  [B,C,H,W] -> [B,C,H/2,W/2]

    Args:
        kernel: low-pass filter of even size; None = the mean of 2 x 2 pixels.  [1,1,k,k]
        border: whether the filter finds zeros beyond the border; if not, x must have k/2 - 1 more pixels on each side.
    """
    if kernel is None:
        return f.avg_pool2d(x, 2)
    padding = (kernel.shape[-1] - 1) // 2 if border else 0
    kernel = kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return f.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)


def upsample(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Doubles the resolution.  kernel as for downsample; None = each pixel four times.  [B,C,H,W] -> [B,C,2H,2W]"""
    if kernel is None:
        return f.interpolate(x, scale_factor=2, mode="nearest")
    padding = (kernel.shape[-1] - 1) // 2
    kernel = 4 * kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return f.conv_transpose2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalisation, statistics in float32 or better.  weight, bias [C] -> [B,C,H,W]"""
    return f.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x) (1 + scale) + shift).  scale and shift [B,C,1,1]; None = 0 -> [B,C,H,W]"""
    y = group_norm(x, weight, bias, groups, eps)
    if scale is not None and shift is not None:
        y = y * (scale + 1) + shift
    return f.silu(y)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32.  q [B,heads,L,D], k and v [B,heads,Lk,D] -> [B,heads,L,D]"""
    return f.scaled_dot_product_attention(q, k, v)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Queries, keys and values as convolutions give them: [B,3C,H,W] -> [B,heads,C/heads,3,H*W]"""
    return x.reshape(x.shape[0], heads, -1, 3, x.shape[2] * x.shape[3])


def require_heads(channels: int, heads: int) -> None:
    """Lets channels be split among heads.  heads 0 = no attention.  Raises: ValueError: they do not divide."""
    if heads and channels % heads:
        raise ValueError(f"{channels} channels cannot be split among {heads} heads of attention")


def self_attention(qkv: Tensor) -> Tensor:
    """Attention among pixels, each head on its own.  qkv [B,heads,C/heads,3,H*W] -> [B,heads,C/heads,H*W]"""
    # Contiguous: torch has fused kernels for that alone, and else makes the matrix of all pairs of pixels.
    q, k, v = (part.contiguous() for part in qkv.transpose(2, 4).unbind(3))
    # Contiguous: of one head, the transpose is an image in channels-last order, whose group norm func.jvp refuses.
    return attention(q, k, v).transpose(2, 3).contiguous()
