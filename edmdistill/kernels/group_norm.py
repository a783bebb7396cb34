"""Group normalization, alone or with scale, shift and SiLU after it.  Results have the dtype of the input."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.backend import uses_triton
from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent, tangent_of, value


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization, statistics in float32 or better.  weight, bias [C] -> [B,C,H,W]"""
    return f.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


@tangent_of(f.group_norm)
def group_norm_rule(function: Function, x: Dual, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Dual:
    """y = n w + b, n = (x - mean) / std;  dy = w (dx - mean(dx) - n mean(n dx)) / std, in float32 or better."""
    (B, C), size = x.shape[:2], x.shape[2:].numel()
    wide, dwide = (tensor.to(at_least_float32(x.dtype)) for tensor in (x.value, x.tangent))
    # For its mean and 1/std too: var_mean takes several times as long on images in channels-last order.
    wide = wide if wide.device.type == "cpu" else wide.contiguous()
    half = x.dtype != wide.dtype
    factor, shift = (None, None) if half else (weight, bias)
    y, mean, rstd = torch.native_group_norm(wide, factor, shift, B, C, size, groups, eps)
    mask = [True, False, False]
    dn = torch.ops.aten.native_group_norm_backward(dwide, wide, mean, rstd, None, B, C, size, groups, mask)[0]
    return Dual(function(x.value, groups, weight, bias, eps) if half else y, dn.to(x.dtype) * weight[:, None, None])


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
    if isinstance(x, Dual) and x.dtype != torch.float64 and uses_triton(x.value):
        from edmdistill.kernels import group_norm_triton  # it needs Triton

        modulation = (
            None if scale is None or shift is None else (*map(value, (scale, shift)), *map(tangent, (scale, shift)))
        )
        pair = group_norm_triton.group_norm_silu(x.value, x.tangent, weight, bias, groups, eps, modulation)
        return cast(Tensor, Dual(*pair))
    y = group_norm(x, weight, bias, groups, eps)
    if scale is not None and shift is not None:
        y = y * (scale + 1) + shift
    return f.silu(y)
