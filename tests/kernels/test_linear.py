"""Convolutions."""

import pytest
import torch

from edmdistill.kernels.linear import conv2d, lay_out_weights


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_keeps_the_resolution(size: int) -> None:
    x, weight, bias = torch.randn(2, 8, 6, 6), torch.randn(5, 8, size, size), torch.randn(5)
    assert conv2d(x, weight, bias).shape == (2, 5, 6, 6)


def test_weights_are_laid_out_for_the_cpu_alone() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(3, 2))
    weight = layers[0].weight.clone()
    for plain, layout in ((False, torch.channels_last), (True, torch.contiguous_format)):
        lay_out_weights(layers, plain)
        assert layers[0].weight.is_contiguous(memory_format=layout)
        assert torch.equal(layers[0].weight, weight)
    lay_out_weights(layers.to("meta"))
    assert layers[0].weight.is_contiguous()
