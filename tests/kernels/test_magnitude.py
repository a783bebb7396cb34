"""EDM2's operations: unit variance in, unit variance out."""

import pytest
import torch
from torch.nn.functional import silu

from edmdistill.kernels import magnitude

B, C, SIZE = 8, 64, 16


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(B, C, SIZE, SIZE)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_operations_keep_the_magnitude(x: torch.Tensor) -> None:
    y = torch.randn(B, 24, SIZE, SIZE)
    assert rms(silu(x)) == pytest.approx(magnitude.SILU_RMS, rel=0.02)
    a, b = magnitude.mp_sum_factors(0.3)
    assert rms(a * x + b * torch.randn_like(x)) == pytest.approx(1, abs=0.02)
    assert b / a == pytest.approx(3 / 7)
    assert rms(magnitude.normalize(x * 7, 1)) == pytest.approx(1, abs=1e-3)
    assert rms(magnitude.mp_cat(x, y, 0.5)) == pytest.approx(1, abs=0.02)
    weight = magnitude.mp_weight(torch.randn(32, C, 3, 3) * 5, factor=3.0)
    inside = magnitude.mp_conv(x, weight)[..., 1:-1, 1:-1]  # zeros beyond the border lessen the rest
    assert rms(inside) == pytest.approx(3, abs=0.15)
    linear = magnitude.mp_conv(x.mean((2, 3)) * SIZE, magnitude.mp_weight(torch.randn(2000, C)))
    assert rms(linear) == pytest.approx(1, abs=0.1)


def test_concatenation_weighs_by_magnitude_not_by_channels(x: torch.Tensor) -> None:
    y = torch.randn(B, 16, SIZE, SIZE)
    a, b = magnitude.mp_cat(x, y, 0.25).split([C, 16], dim=1)
    assert a.square().sum().sqrt() / b.square().sum().sqrt() == pytest.approx(3, rel=0.02)


def test_weights_have_unit_rms_in_each_output() -> None:
    """All but the 1e-4 that the paper adds to the rms."""
    weights = [torch.randn(5, 7, 3, 3) * 100, torch.randn(4, 6) / 100]
    small = weights[1].square().mean(1).sqrt()
    magnitude.normalize_weights_(weights)
    torch.testing.assert_close(weights[0].square().mean((1, 2, 3)), torch.ones(5))
    torch.testing.assert_close(weights[1].square().mean(1).sqrt(), small / (small + 1e-4))
    magnitude.normalize_weights_([])


def test_norms_of_half_precision_are_float32() -> None:
    """65504 is the largest number of float16, and 1e-4 hardly more than the least."""
    large = torch.full((2, 8192), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(magnitude.normalize(large, 1), torch.ones_like(large))
    for scaled in (magnitude.mp_weight(large), large * magnitude.mp_scale(large)):
        torch.testing.assert_close(scaled, torch.full((2, 8192), 8192**-0.5))
    small = magnitude.normalize(torch.full((2, 64), 1e-5, dtype=torch.float64), 1)
    torch.testing.assert_close(small, torch.full_like(small, 1 / 11))


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (4, 6)])
def test_weights_are_scaled_by_what_normalizes_them(shape: tuple[int, ...]) -> None:
    weight, gain = torch.randn(shape, dtype=torch.float64) * 1e-3, torch.tensor(0.7, dtype=torch.float64)
    expected = magnitude.mp_weight(weight, gain, 3.0)
    torch.testing.assert_close(weight * magnitude.mp_scale(weight, gain, 3.0), expected, rtol=1e-12, atol=0)
    rms = weight.square().mean(tuple(range(1, weight.ndim)), keepdim=True).sqrt()
    torch.testing.assert_close(expected, 2.1 * weight / (rms + 1e-4) / weight[0].numel() ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_fourier_features_are_float32_or_better(dtype: torch.dtype) -> None:
    c = torch.linspace(-1.5, 1.1, 500, dtype=dtype)
    features = magnitude.mp_fourier(c, 6.28 * torch.randn(64), 6.28 * torch.rand(64))
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rms(features) == pytest.approx(1, abs=0.1)
