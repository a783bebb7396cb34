"""The circle's conversions and moves, in float64."""

import math

import pytest
import torch
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.trigflow import (
    cos_sin,
    ddim_flow,
    ddim_step,
    denoised,
    diffuse,
    expand,
    implied_noise,
    sigma_to_time,
    time_to_sigma,
    velocity,
    written_levels,
)

SIGMA_DATA = 0.5


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Data and noise.  [4,3,5,5] each"""
    torch.manual_seed(0)
    x0, z = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64) * SIGMA_DATA
    return x0, z


TIMES = torch.tensor([1e-3, 0.4, 1.2, math.pi / 2], dtype=torch.float64)


def test_sigma_and_time_are_inverse() -> None:
    sigma = torch.logspace(-6, 6, 100, dtype=torch.float64)
    torch.testing.assert_close(time_to_sigma(sigma_to_time(sigma, SIGMA_DATA), SIGMA_DATA), sigma, rtol=1e-9, atol=0)
    assert sigma_to_time(0.0, SIGMA_DATA) == 0
    assert sigma_to_time(SIGMA_DATA, SIGMA_DATA) == pytest.approx(math.pi / 4)
    assert sigma_to_time(math.inf, SIGMA_DATA) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("sigmas", [(80.0, 2.5, 0.3), (2.5, 0.7, 0.002), (40.5, 0.00048828125)])
@pytest.mark.parametrize("sigma_data", [0.5, 0.29, 1.0])
def test_levels_are_written_as_they_were_given(sigmas: tuple[float, ...], sigma_data: float) -> None:
    back = time_to_sigma(sigma_to_time(torch.tensor(sigmas, dtype=torch.float64), sigma_data), sigma_data)
    assert written_levels(back.tolist()) == sigmas
    assert written_levels(torch.tensor(sigmas).tolist()) == written_levels(sigmas) == sigmas


def test_written_levels_keep_twelve_digits() -> None:
    levels = torch.logspace(-3, 3, 50, dtype=torch.float64).tolist()
    assert written_levels(levels) == pytest.approx(levels, rel=1e-11, abs=0)


def test_conversions_are_float64_whatever_comes_in() -> None:
    assert sigma_to_time(torch.tensor(80.0), SIGMA_DATA).dtype == torch.float64
    assert time_to_sigma(torch.tensor(1.5), SIGMA_DATA).dtype == torch.float64


def test_a_point_is_edms_scaled_by_cos(pair: tuple[Tensor, Tensor]) -> None:
    x0, z = pair
    sigma = torch.tensor([0.002, 0.5, 7.0, 80.0], dtype=torch.float64)
    t = sigma_to_time(sigma, SIGMA_DATA)
    edm = x0 + expand(sigma, x0) * z / SIGMA_DATA
    torch.testing.assert_close(diffuse(x0, z, t), expand(t, x0).cos() * edm)


def test_velocity_is_the_derivative(pair: tuple[Tensor, Tensor]) -> None:
    x0, z = pair
    h = 1e-6
    difference = (diffuse(x0, z, TIMES + h) - diffuse(x0, z, TIMES - h)) / (2 * h)
    torch.testing.assert_close(velocity(x0, z, TIMES), difference, rtol=1e-8, atol=1e-8)


def test_the_true_velocity_denoises_exactly(pair: tuple[Tensor, Tensor]) -> None:
    x0, z = pair
    x_t, F = diffuse(x0, z, TIMES), velocity(x0, z, TIMES) / SIGMA_DATA
    torch.testing.assert_close(denoised(x_t, F, TIMES, SIGMA_DATA), x0)
    torch.testing.assert_close(implied_noise(x_t, x0, TIMES), z, rtol=1e-9, atol=1e-9)


def test_ddim_step_follows_the_true_velocity_to_any_time(pair: tuple[Tensor, Tensor]) -> None:
    x0, z = pair
    x_t, F = diffuse(x0, z, TIMES), velocity(x0, z, TIMES) / SIGMA_DATA
    for s in (torch.tensor(0.0), torch.tensor(0.3), TIMES / 2, TIMES):
        torch.testing.assert_close(ddim_step(x_t, F, TIMES, s, SIGMA_DATA), diffuse(x0, z, s))


def test_ddim_flow_is_its_inverse(pair: tuple[Tensor, Tensor]) -> None:
    x_t, F = pair
    for s in (TIMES / 3, torch.zeros(4)):
        x_s = ddim_step(x_t, F, TIMES, s, SIGMA_DATA)
        torch.testing.assert_close(ddim_flow(x_t, x_s, TIMES, s, SIGMA_DATA), F, rtol=1e-9, atol=1e-9)


def test_ddim_step_to_0_is_the_denoiser(pair: tuple[Tensor, Tensor]) -> None:
    x_t, F = pair
    assert_rounded(ddim_step(x_t, F, TIMES, torch.zeros(4), SIGMA_DATA), denoised(x_t, F, TIMES, SIGMA_DATA), 10)


def test_times_of_one_image_or_of_all(pair: tuple[Tensor, Tensor]) -> None:
    x0, z = pair
    t = torch.tensor(0.7)
    assert_rounded(diffuse(x0, z, t), diffuse(x0, z, t.expand(4)), 10)  # vector units take four cosines at once


def test_functions_of_time_are_computed_in_float64() -> None:
    """Near pi/2 and in float32, a time has lost its cosine."""
    x = torch.zeros(3, 5, device="meta")
    t = math.pi / 2 - torch.tensor([1e-8, 1e-5, 1e-2], dtype=torch.float64)
    assert (expand(t.float(), x).dtype, expand(t, x).device, expand(t, x).shape) == (torch.float64, x.device, (3, 1))
    for dtype in (torch.float16, torch.float32):
        cos, sin = cos_sin(t, torch.zeros(3, 5, dtype=dtype))
        assert torch.equal(cos.flatten(), t.cos().to(dtype))
        assert torch.equal(sin.flatten(), t.sin().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moves_keep_the_images_dtype(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    x0, z = (x.to(dtype) for x in pair)
    for result in (diffuse(x0, z, TIMES), velocity(x0, z, TIMES), denoised(x0, z, TIMES, SIGMA_DATA)):
        assert result.dtype == dtype
