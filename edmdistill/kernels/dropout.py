"""Dropout whose masks belong to rows: the same on every device, in any micro-batch, and when a layer is recomputed."""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.draws import words

LEVELS = 2**16
"""Values of the random integers that decide; four come of a word."""


def dropout(x: Tensor, p: float, keys: Tensor | None, layer: int) -> Tensor:
    """Returns x with a share p of its elements set to 0 and the others divided by 1 - p.

    Args:
        x: at least two dimensions.  [B,...]
        p: in [0, 1]; rounded to a multiple of 2^-16.
        keys: of the rows in this forward pass, from Draws.dropout; None = no dropout.  [B] int64
        layer: number of the layer, below draws.LAYERS; each has masks of its own.
    """
    threshold = round(p * LEVELS)
    if keys is None or threshold == 0:
        return x
    if threshold == LEVELS:
        return x * 0.0
    shape, n = x.shape, x.shape[1:].numel()
    numbers = words(keys, -(-n // 4), layer).view(torch.int16)[:, :n]
    return x.masked_fill((numbers < threshold - LEVELS // 2).reshape(shape), 0.0) * (LEVELS / (LEVELS - threshold))
