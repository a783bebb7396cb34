"""Random initial values."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*size: int, std: float = 1.0) -> Tensor:
    """Returns normal numbers of mean 0; on the meta device, only their shape.  [*size]

    torch draws shapes through its compiler, and importing that takes a second.
    """
    numbers = torch.empty(size)
    return numbers if numbers.is_meta else numbers.normal_().mul_(std)
