"""Convolutions."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from edmdistill.kernels.linear import allow_tf32, conv2d, lay_out_weights, tf32_allowed


@pytest.fixture
def _flags() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("_flags")
def test_tf32_is_allowed_for_a_while() -> None:
    """In matrix products and convolutions; then each is as it was, also after an error."""
    for allowed in (True, False):
        allow_tf32(allowed)
        assert tf32() == (allowed, allowed)
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        with suppress(KeyError), tf32_allowed(False):
            assert tf32() == (False, False)
            raise KeyError
        assert tf32() == (not allowed, allowed)


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
