"""A small batch of feature maps."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 8, 6, 6, dtype=torch.float64)
