"""Group normalization, alone or with scale, shift and SiLU after it.  Results have the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent_of


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization, statistics in float32 or better.  weight, bias [C] -> [B,C,H,W]"""
    return f.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


@tangent_of(f.group_norm)
def group_norm_rule(function: Function, x: Dual, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Dual:
    """y = n w + b, n = (x - mean) / std;  dy = w (dx - mean(dx) - n mean(n dx)) / std, in float32 or better."""
    (B, C), size = x.shape[:2], x.shape[2:].numel()
    wide, dwide = (tensor.to(at_least_float32(x.dtype)) for tensor in (x.value, x.tangent))
    variance, mean = torch.var_mean(wide.reshape(B, groups, -1), -1, correction=0)
    rstd = (variance + eps).rsqrt()
    mask = [True, False, False]
    dn = torch.ops.aten.native_group_norm_backward(dwide, wide, mean, rstd, None, B, C, size, groups, mask)[0]
    return Dual(function(x.value, groups, weight, bias, eps), dn.to(x.dtype) * weight[:, None, None])


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
