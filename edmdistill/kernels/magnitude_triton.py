"""Triton: EDM2's weights, c gain w / (|w| / sqrt(N) + 1e-4) for each output w of N inputs, forward and backward.

torch makes and saves some five tensors of a weight's size; here the weight is read twice and the result written once,
and the backward pass saves the norms alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements at a time."""


@triton.jit
def mp_weight_kernel(W, GAIN, Y, NORM, N, c, BLOCK: tl.constexpr):
    """One program for each output."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(W + row * N + i, mask=i < N, other=0.0)
        squares += w * w
    norm = tl.sqrt(tl.sum(squares, 0))
    tl.store(NORM + row, norm)
    factor = tl.load(GAIN) * c / (norm / tl.sqrt(N * 1.0) + 1e-4)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(W + row * N + i, mask=i < N, other=0.0)
        tl.store(Y + row * N + i, w * factor, mask=i < N)


@triton.jit
def mp_weight_backward_kernel(W, GAIN, NORM, DY, DW, DGAIN, N, c, BLOCK: tl.constexpr):
    """dw = f (dy - w <w, dy> / (r |w| sqrt(N))), with r = |w| / sqrt(N) + 1e-4 and f = c gain / r."""
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(W + row * N + i, mask=i < N, other=0.0)
        products += w * tl.load(DY + row * N + i, mask=i < N, other=0.0)
    inner, norm, root = tl.sum(products, 0), tl.load(NORM + row), tl.sqrt(N * 1.0)
    r = norm / root + 1e-4
    tl.store(DGAIN + row, inner * c / r)
    factor = tl.load(GAIN) * c / r
    along = tl.where(norm > 0, inner / (r * norm * root), 0.0)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(W + row * N + i, mask=i < N, other=0.0)
        dy = tl.load(DY + row * N + i, mask=i < N, other=0.0)
        tl.store(DW + row * N + i, factor * (dy - w * along), mask=i < N)


class _MPWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, c: float) -> Tensor:
        weight = weight.contiguous()
        M, N = len(weight), weight[0].numel()
        y, norm = torch.empty_like(weight), weight.new_empty(M)
        mp_weight_kernel[(M,)](weight, gain, y, norm, N, c, min(BLOCK, triton.next_power_of_2(N)))
        ctx.save_for_backward(weight, gain, norm)
        ctx.c = c
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, gain, norm = ctx.saved_tensors
        M, N = len(weight), weight[0].numel()
        dweight, dgain = torch.empty_like(weight), torch.empty_like(norm)
        block = min(BLOCK, triton.next_power_of_2(N))
        mp_weight_backward_kernel[(M,)](weight, gain, norm, dy[0].contiguous(), dweight, dgain, N, ctx.c, block)
        return dweight, dgain.sum().to(gain.dtype).reshape(gain.shape), None


def mp_weight(weight: Tensor, gain: Tensor | float, factor: float) -> Tensor:
    """Returns magnitude.mp_weight.  weight [M,...] float32; gain 0-dim or [1] -> [M,...] float32"""
    gain = gain if isinstance(gain, Tensor) else torch.full((), gain, device=weight.device)
    y: Tensor = _MPWeight.apply(weight, gain, factor / math.sqrt(weight[0].numel()))  # type: ignore[no-untyped-call, unused-ignore]
    return y
