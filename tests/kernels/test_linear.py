"""Convolutions."""

import pytest
import torch

from edmdistill.kernels.linear import conv2d


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_keeps_the_resolution(size: int) -> None:
    x, weight, bias = torch.randn(2, 8, 6, 6), torch.randn(5, 8, size, size), torch.randn(5)
    assert conv2d(x, weight, bias).shape == (2, 5, 6, 6)
