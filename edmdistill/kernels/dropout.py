"""Dropout with masks that belong to rows: equal on every device, in any micro-batch, and in a recomputed layer."""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.draws import words
from edmdistill.kernels.dual import linear_rule, tangent_of

RANGE = 2**16
"""Number of values of the random integers that are compared with p; a 64-bit word holds four."""

tangent_of(Tensor.masked_fill)(linear_rule)


def dropout(x: Tensor, p: float, keys: Tensor | None, layer: int) -> Tensor:
    """Returns x with a share p of its elements set to 0 and the others divided by 1 - p.

    Args:
        x: at least two dimensions.  [B,...]
        p: in [0, 1]; rounded to a multiple of 2^-16.
        keys: of the rows in this forward pass, from Draws.dropout; None = no dropout.  [B] int64
        layer: number of the layer, below draws.LAYERS; each has its own masks.
    """
    threshold = round(p * RANGE)
    if keys is None or threshold == 0:
        return x
    if threshold == RANGE:
        return x * 0.0
    shape, n = x.shape, x.shape[1:].numel()
    numbers = words(keys, -(-n // 4), layer).view(torch.int16)[:, :n]
    return x.masked_fill((numbers < threshold - RANGE // 2).reshape(shape), 0.0) * (RANGE / (RANGE - threshold))
