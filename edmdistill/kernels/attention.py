"""Attention, and self-attention among the pixels of an image.  Results have the dtype of the input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.backend import uses_triton
from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent_of, value


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32.  q [B,heads,L,D], k and v [B,heads,Lk,D] -> [B,heads,L,D]"""
    return f.scaled_dot_product_attention(q, k, v)


@tangent_of(f.scaled_dot_product_attention)
def attention_rule(function: Function, y: Tensor, q: Dual, k: Dual, v: Dual) -> Tensor:
    """P (dS - sum(P dS)) v + P dv, of y = P v, P = softmax(S), S = q k^T / sqrt(D); P and dS in float32 or better.

    Source: sCM, appendix F.  Differs: the sum over keys is subtracted before the product with v.
    """
    if uses_triton(q.value):
        from edmdistill.kernels import attention_triton  # it needs Triton

        if attention_triton.supports(q.value):
            return attention_triton.attention_tangent(*(x.value for x in (q, k, v)), *(x.tangent for x in (q, k, v)))
    wide, scale = at_least_float32(q.dtype), 1 / math.sqrt(q.shape[-1])
    qs, dqs = q.value * scale, q.tangent * scale
    P = (qs @ k.value.mT).softmax(-1, dtype=wide)
    dS = torch.cat([dqs, qs], -1) @ torch.cat([k.value, k.tangent], -1).mT
    dP = torch.ops.aten._softmax_backward_data(dS.to(wide), P, -1, wide)
    dy: Tensor = dP.to(v.dtype) @ v.value + P.to(v.dtype) @ v.tangent
    return dy


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Returns queries, keys and values, by head, of a convolution's output.  [B,3C,H,W] -> [3,B,heads,H*W,C/heads]"""
    B, C, H, W = x.shape
    # Contiguous: only then has torch fused kernels; else it makes the matrix of all pairs of pixels.
    return x.reshape(B, heads, C // heads // 3, 3, H * W).permute(3, 0, 1, 4, 2).contiguous()


def require_heads(channels: int, heads: int) -> None:
    """Requires that channels can be split among heads.  0 heads = no attention.  Raises: ValueError: they cannot."""
    if heads and channels % heads:
        raise ValueError(f"{channels} channels cannot be split among {heads} heads of attention")


def self_attention(qkv: Tensor, like: Tensor) -> Tensor:
    """Returns attention among pixels, by head, in `like`'s layout.  qkv from split_heads -> [B,C,H,W], as like"""
    y = attention(*qkv.unbind(0))
    B, C, H, W = like.shape
    if value(like).is_contiguous(memory_format=torch.channels_last):
        return y.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
    # Contiguous: of one head, the transpose is an image in channels-last order, whose group norm func.jvp refuses.
    return y.transpose(2, 3).contiguous().reshape(like.shape)
