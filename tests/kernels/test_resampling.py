"""Resampling keeps constants, and each direction is the other's transpose."""

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.linear import conv2d
from edmdistill.kernels.resampling import downsample, is_box, separable, upsample, upsampled_conv2d

BOX, NCSN = (1, 1), (1, 3, 3, 1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("taps", [BOX, NCSN])
def test_filters_keep_a_constant(taps: tuple[float, ...]) -> None:
    kernel = separable(taps)
    assert kernel.sum() == 1
    ones = torch.ones(1, 3, 8, 8)
    inside = slice(1, -1)
    torch.testing.assert_close(downsample(ones, kernel)[..., inside, inside], ones[..., :2, :2])
    torch.testing.assert_close(upsample(ones, kernel)[..., inside, inside], torch.ones(1, 3, 14, 14))


def test_the_box_has_two_ways(x: Tensor) -> None:
    kernel = separable(BOX)
    torch.testing.assert_close(downsample(x), downsample(x, kernel))
    torch.testing.assert_close(upsample(x), upsample(x, kernel))
    assert is_box(BOX)
    assert not is_box((1, 3))
    assert not is_box((1, 1, 1, 1))
    assert not is_box(NCSN)


@pytest.mark.parametrize("taps", [BOX, NCSN])
def test_up_is_the_transpose_of_down(x: Tensor, taps: tuple[float, ...]) -> None:
    kernel = separable(taps)
    y = random(2, 8, 3, 3)
    torch.testing.assert_close((downsample(x, kernel) * y).sum() * 4, (x * upsample(y, kernel)).sum())


def test_downsample_without_border_reads_what_is_there(x: Tensor) -> None:
    kernel = separable(NCSN)
    padded = f.pad(x, [1] * 4)
    torch.testing.assert_close(downsample(padded, kernel, border=False), downsample(x, kernel))


@pytest.mark.parametrize("size", [1, 3])
def test_upsampled_conv2d(x: Tensor, size: int) -> None:
    weight, bias = random(5, x.shape[1], size, size), random(5)
    torch.testing.assert_close(upsampled_conv2d(x, weight, bias), conv2d(upsample(x), weight, bias))
