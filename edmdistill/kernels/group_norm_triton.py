"""Triton: the tangent of silu(group_norm(x) (1 + scale) + shift), in one kernel with statistics in float32.

torch runs it in several kernels, each of which reads and writes whole images; here x and dx are read three times, from
a cache mostly, and dy is written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements at a time."""


@triton.jit
def offset_of(i, cg, HW, stride_c, stride_p, LAST: tl.constexpr):
    """Returns the channel in its group and the place of element i, in the order in which memory has them."""
    channel = i % cg if LAST else i // HW
    pixel = i // cg if LAST else i % HW
    return channel, channel * stride_c + pixel * stride_p


@triton.jit
def group_norm_silu_kernel(
    X, DX, W, B, SCALE, SHIFT, DSCALE, DSHIFT, DY, C, HW, groups, stride_c, stride_p, eps,
    MODULATED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each group of each image."""
    n, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    cg = C // groups
    size = cg * HW
    base = n.to(tl.int64) * C * HW + group.to(tl.int64) * cg * stride_c

    sum_x, sum_dx = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _, at = offset_of(i, cg, HW, stride_c, stride_p, LAST)
        sum_x += tl.load(X + base + at, mask=i < size, other=0.0).to(tl.float32)
        sum_dx += tl.load(DX + base + at, mask=i < size, other=0.0).to(tl.float32)
    mean, dmean = tl.sum(sum_x, 0) / size, tl.sum(sum_dx, 0) / size

    # Of centered values: the difference of two large sums would cancel.
    squares, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _, at = offset_of(i, cg, HW, stride_c, stride_p, LAST)
        x = tl.load(X + base + at, mask=i < size, other=0.0).to(tl.float32)
        dx = tl.load(DX + base + at, mask=i < size, other=0.0).to(tl.float32)
        centered = tl.where(i < size, x - mean, 0.0)
        squares += centered * centered
        products += centered * (dx - dmean)
    rstd = 1 / tl.sqrt(tl.sum(squares, 0) / size + eps)
    slope = tl.sum(products, 0) / size * rstd  # mean(n dx)

    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        channel, at = offset_of(i, cg, HW, stride_c, stride_p, LAST)
        channel += group * cg
        x = tl.load(X + base + at, mask=inside, other=0.0).to(tl.float32)
        dx = tl.load(DX + base + at, mask=inside, other=0.0).to(tl.float32)
        normal = (x - mean) * rstd
        weight = tl.load(W + channel, mask=inside, other=0.0).to(tl.float32)
        dy = weight * (dx - dmean - normal * slope) * rstd
        y = weight * normal + tl.load(B + channel, mask=inside, other=0.0).to(tl.float32)
        if MODULATED:
            row = n * C + channel
            scale = tl.load(SCALE + row, mask=inside, other=0.0).to(tl.float32) + 1
            dscale = tl.load(DSCALE + row, mask=inside, other=0.0).to(tl.float32)
            dy = dy * scale + y * dscale + tl.load(DSHIFT + row, mask=inside, other=0.0).to(tl.float32)
            y = y * scale + tl.load(SHIFT + row, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-y))
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
        tl.store(DY + base + at, dy.to(DY.dtype.element_ty), mask=inside)


def group_norm_silu_tangent(
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    modulation: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns the tangent of silu(group_norm(x) (1 + scale) + shift) along dx.

    Args:
        x, dx: any memory format.  [B,C,H,W]
        weight, bias: constants.  [C]
        modulation: scale, shift, and their tangents; None: 0.  [B,C,1,1] each
    """
    (B, C), HW = x.shape[:2], x.shape[2:].numel()
    last = C > 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x, dx = (
        tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) for tensor in (x, dx)
    )
    dy = torch.empty_like(x)
    rows = (weight,) * 4 if modulation is None else tuple(tensor.contiguous() for tensor in modulation)
    strides = (1, C) if last else (HW, 1)
    block = min(BLOCK, triton.next_power_of_2(C // groups * HW))
    group_norm_silu_kernel[(B * groups,)](
        x, dx, weight.contiguous(), bias.contiguous(), *rows, dy, C, HW, groups, *strides, eps,
        modulation is not None, last, block,
    )  # fmt: skip
    return dy
