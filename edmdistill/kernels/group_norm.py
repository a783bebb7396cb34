"""Group normalization, alone or with scale, shift and SiLU after it.  Results have the dtype of the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.backend import uses_triton
from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent, tangent_of, value, with_tangent


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization, statistics in float32 or better.  weight, bias [C] -> [B,C,H,W]"""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if isinstance(x, Dual):  # the operation under f.group_norm; its rule needs the mean and 1/std that it also returns
        (B, C), size = x.shape[:2], x.shape[2:].numel()
        x = x if x.device.type == "cpu" else x.contiguous()
        y: Tensor = torch.native_group_norm(x, weight, bias, B, C, size, groups, eps)[0]
        return y
    return f.group_norm(x, groups, weight, bias, eps)


@tangent_of(torch.native_group_norm)
def group_norm_rule(
    function: Function,
    y: Any,
    x: Dual,
    weight: Tensor,
    bias: Tensor,
    B: int,
    C: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, None, None]:
    """w (dx - mean(dx) - n mean(n dx)) / std, of y = n w + b, n = (x - mean) / std; in float32 or better."""
    wide, dwide = (tensor.to(at_least_float32(x.dtype)) for tensor in (x.value, x.tangent))
    # Mean and 1/std are torch's: var_mean takes several times as long on images in channels-last order.
    _, mean, rstd = y if x.dtype == wide.dtype else function(wide, None, None, B, C, size, groups, eps)
    mask = [True, False, False]
    dn = torch.ops.aten.native_group_norm_backward(dwide, wide, mean, rstd, None, B, C, size, groups, mask)[0]
    return dn.to(x.dtype) * weight[:, None, None], None, None


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
        fused: Tensor = with_tangent(fused_rule, group_norm_silu, x, weight, bias, groups, eps, scale, shift)
        return fused
    y = group_norm(x, weight, bias, groups, eps)
    if scale is not None and shift is not None:
        y = y * (scale + 1) + shift
    return f.silu(y)


def fused_rule(
    function: Function, y: Tensor, x: Dual, weight: Tensor, bias: Tensor, groups: int, eps: float, *modulation: Any
) -> Tensor:
    """Returns the tangent of `group_norm_silu` by Triton's kernel."""
    from edmdistill.kernels import group_norm_triton  # it needs Triton

    values, tangents = (map(part, modulation) for part in (value, tangent))
    rows = None if modulation[0] is None else (*values, *tangents)
    return group_norm_triton.group_norm_silu_tangent(x.value, x.tangent, weight, bias, groups, eps, rows)
