"""Halving and doubling of resolution.  Images are [B,C,H,W]; results have the dtype of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.dual import Dual, Function, affine_rule, linear_rule, tangent_of
from edmdistill.kernels.linear import conv2d

tangent_of(f.avg_pool2d, f.interpolate)(linear_rule)
tangent_of(f.conv_transpose2d)(affine_rule)


@tangent_of(f.pad)
def pad_rule(function: Function, y: Tensor, x: Dual, width: list[int], **kwargs: Any) -> Any:
    """Whatever the value is padded with, its tangent is padded with zeros."""
    return function(x.tangent, width, **kwargs | {"value": None})


def is_box(taps: Sequence[float]) -> bool:
    """Returns whether the filter is the mean of two neighbors, which needs no convolution."""
    return len(taps) == 2 and taps[0] == taps[1]


def separable(taps: Sequence[float], device: str | None = None) -> Tensor:
    """Returns the low-pass filter taps x taps, of sum 1.  An even number k of taps -> [1,1,k,k] float32"""
    total = sum(taps) ** 2
    products = [[row * column / total for column in taps] for row in taps]
    return torch.tensor([[products]], dtype=torch.float32, device=device)


def downsample(x: Tensor, kernel: Tensor | None = None, border: bool = True) -> Tensor:
    """Halves the resolution.  [B,C,H,W] -> [B,C,H/2,W/2]

    Args:
        kernel: low-pass filter of even size; None = the mean of 2 x 2 pixels.  [1,1,k,k]
        border: whether x is padded by zeros; if not, it must have k/2 - 1 more pixels on each side.
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


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns conv2d(upsample(x), weight, bias), with fewer multiplications.  -> [B,M,2H,2W]

    A kernel of 1x1 is applied before upsampling: 1/4 of them. One of 3x3 sees four pixels of x from each new pixel,
    through sums of its taps, which is a transposed convolution of kernel 4x4: 4/9 of them. The latter is for the CPU in
    float32 or float64 alone; elsewhere it has not been measured.
    """
    if weight.shape[-1] == 1:
        return upsample(conv2d(x, weight, bias))
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return conv2d(upsample(x), weight, bias)
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=x.dtype, device="cpu")
    M, C, *_ = weight.shape
    sums = torch.kron(taps, taps) @ weight.to(x.dtype).permute(2, 3, 0, 1).reshape(9, M * C)
    return f.conv_transpose2d(x, sums.view(4, 4, M, C).permute(3, 2, 0, 1), bias, stride=2, padding=1)
