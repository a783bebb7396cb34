"""Triton: the tangent of attention in one pass over the keys, without the matrix of all pairs in memory.

    S = q k^T / sqrt(D),  dS = (dq k^T + q dk^T) / sqrt(D),  P = softmax(S)
    o = P v,  do = (P dS) v + P dv - sum(P dS) o

Source: sCM, appendix F.  Differs: each row of dS is centered by the first block's mean of P dS. A softmax's tangent
ignores such a shift, and without it large terms cancel in half precision. Products of float32 are those of three TF32
(tf32x3), which tensor cores compute, exact to about 1e-6.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = {2: {64: (64, 32), 128: (32, 32), 256: (16, 16)}, 4: {64: (32, 32), 128: (16, 16)}}
"""Queries and keys at a time, by bytes of an element and by the largest size of a head: accumulators fit in the
registers, and tiles in the shared memory of all GPUs since 2020."""

STAGES = 2
"""Tiles of keys in the shared memory at a time: one in use, one on its way."""


def supports(q: Tensor) -> bool:
    """Returns whether there is a kernel for heads of this dtype and size: half precision to 256, float32 to 128."""
    return q.shape[-1] <= max(TILES.get(q.element_size(), {0: ()}))


@triton.jit
def attention_kernel(
    Q, K, V, DQ, DK, DV, DY, L, Lk, D, scale, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries of each head of each image."""
    tiles = tl.cdiv(L, ROWS)
    head, rows = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    at = (head * L + rows[:, None]) * D + d[None, :]
    inside = (rows[:, None] < L) & (d[None, :] < D)
    q, dq = tl.load(Q + at, mask=inside, other=0.0), tl.load(DQ + at, mask=inside, other=0.0)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    sum_p, sum_pds, shift = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    o, do = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, Lk, KEYS):
        keys = start + tl.arange(0, KEYS)
        at_key = (head * Lk + keys[:, None]) * D + d[None, :]
        has_key = (keys[:, None] < Lk) & (d[None, :] < D)
        k, dk = tl.load(K + at_key, mask=has_key, other=0.0), tl.load(DK + at_key, mask=has_key, other=0.0)
        v, dv = tl.load(V + at_key, mask=has_key, other=0.0), tl.load(DV + at_key, mask=has_key, other=0.0)
        S = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        S = tl.where(keys[None, :] < Lk, S, float("-inf"))
        dS = tl.dot(dq, tl.trans(k), input_precision="tf32x3") + tl.dot(q, tl.trans(dk), input_precision="tf32x3")
        dS *= scale
        new_largest = tl.maximum(largest, tl.max(S, 1))
        decay = tl.exp(largest - new_largest)
        P = tl.exp(S - new_largest[:, None])
        if start == 0:
            shift = tl.sum(P * dS, 1) / tl.sum(P, 1)
        PdS = P * (dS - shift[:, None])
        sum_p = sum_p * decay + tl.sum(P, 1)
        sum_pds = sum_pds * decay + tl.sum(PdS, 1)
        P_low = P.to(v.dtype)
        o = o * decay[:, None] + tl.dot(P_low, v, input_precision="tf32x3")
        do = do * decay[:, None] + tl.dot(PdS.to(v.dtype), v, input_precision="tf32x3")
        do += tl.dot(P_low, dv, input_precision="tf32x3")
        largest = new_largest
    o /= sum_p[:, None]
    do = do / sum_p[:, None] - (sum_pds / sum_p)[:, None] * o
    tl.store(DY + at, do.to(DY.dtype.element_ty), mask=inside)


def attention_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Returns the tangent of softmax(q k^T / sqrt(D)) v.

    q, dq [B,heads,L,D], the others [B,heads,Lk,D], any strides; see `supports` -> [B,heads,L,D]
    """
    q, k, v, dq, dk, dv = (tensor.contiguous() for tensor in (q, k, v, dq, dk, dv))
    B, heads, L, D = q.shape
    do = torch.empty_like(q)
    padded = max(16, triton.next_power_of_2(D))
    rows, keys = TILES[q.element_size()][max(64, padded)]
    programs = (triton.cdiv(L, rows) * B * heads,)
    attention_kernel[programs](
        q, k, v, dq, dk, dv, do, L, k.shape[2], D, 1 / math.sqrt(D), padded, rows, keys, num_stages=STAGES
    )
    return do
