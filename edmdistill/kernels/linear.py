"""Linear maps and convolutions, in the dtype of their input."""

from __future__ import annotations

import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.dual import affine_rule, tangent_of

tangent_of(f.linear, f.conv2d)(affine_rule)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.  x [B,N], weight [M,N], bias [M] -> [B,M]"""
    return f.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution that keeps the resolution (odd kernel, zero padding).  weight [M,C,k,k] -> [B,M,H,W]"""
    bias = None if bias is None else bias.to(x.dtype)
    return f.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)
