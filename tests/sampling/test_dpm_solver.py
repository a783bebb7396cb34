"""Solvers beside Heun's method: their order, their TrigFlow forms, and Heun's method as one of them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden_set import NETWORKS
from torch import Tensor
from toy_denoisers import SIGMA_DATA, ToyDenoiser, curved, gaussian

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.sampling.dpm_solver import ddim_sampler, dpm_solver_2s, dpm_solver_pp_2m
from edmdistill.sampling.heun import EDM2_SAMPLER, EDM_SAMPLER, edm_sampler
from edmdistill.sampling.multistep import ipndm_sampler, unipc_sampler
from edmdistill.trigflow import ddim_step, denoised, sigma_to_time

SAMPLERS = [ddim_sampler, dpm_solver_2s, dpm_solver_pp_2m, ipndm_sampler, unipc_sampler]
NOISE = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("sampler", "order", "calls"),
    [(ddim_sampler, 1, 1), (dpm_solver_2s, 2, 2), (dpm_solver_pp_2m, 2, 1), (ipndm_sampler, 2, 1)],
)
def test_order(sampler: Callable[..., Tensor], order: int, calls: int) -> None:
    """Down to sigma_min the solution for Gaussian data is known; the last call sees what was reached there."""

    def error(num_steps: int) -> float:
        denoiser = ToyDenoiser(gaussian)
        sampler(denoiser, NOISE, sigmas=EDM_SAMPLER.sigmas(denoiser, num_steps, 0.5, 4.0))
        assert len(denoiser.images) == calls * num_steps - (calls - 1)
        exact = NOISE * 4.0 * ((SIGMA_DATA**2 + 0.25) / (SIGMA_DATA**2 + 16)) ** 0.5
        return float((denoiser.images[-1] - exact).abs().max())

    errors = [error(num_steps) for num_steps in (65, 129, 257)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_heun_is_dpm_solver_2s_with_its_point_at_the_end(golden: Path, name: str) -> None:
    denoiser = load_denoiser(golden / name, "cpu", torch.float64)
    shape = 1, denoiser.img_channels, denoiser.img_resolution, denoiser.img_resolution
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(denoiser.label_dim)[:1] if denoiser.label_dim else None
    sigmas = EDM_SAMPLER.sigmas(denoiser, 4)
    with torch.no_grad():
        heun = edm_sampler(denoiser, noise, labels, sigmas=sigmas)
        ours = dpm_solver_2s(denoiser, noise, labels, sigmas=sigmas, midpoint=1.0)
    torch.testing.assert_close(ours, heun, rtol=0, atol=1e-10 * float(heun.abs().max()))


def flow(x_t: Tensor, t: Tensor) -> Tensor:
    """F of the curved toy."""
    x0 = curved(x_t / t.cos(), SIGMA_DATA * t.tan())
    return (t.cos() * x_t - x0) / (t.sin() * SIGMA_DATA)


def trig_ddim(x: Tensor, s: Tensor, t: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
    return ddim_step(x, flow(x, s), s, t, SIGMA_DATA)  # eq. 26


def trig_dpm(x: Tensor, s: Tensor, t: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
    def eps(x: Tensor, t: Tensor) -> Tensor:
        return t.sin() * x + t.cos() * SIGMA_DATA * flow(x, t)

    between = torch.atan((s.tan() * t.tan()).sqrt())
    x_between = trig_ddim(x, s, between, None)
    r = (s.tan().log() - between.tan().log()) / (s.tan().log() - t.tan().log())
    gap = eps(x_between, between) - eps(x, s)
    return trig_ddim(x, s, t, None) - (s - t).sin() / (2 * r * s.cos()) * gap  # eq. 27


def trig_dpm_pp(x: Tensor, s: Tensor, t: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
    def D(x: Tensor, t: Tensor) -> Tensor:
        return denoised(x, flow(x, t), t, SIGMA_DATA)

    if last is None:
        return trig_ddim(x, s, t, None)
    x_last, t_last = last
    r = (s.tan().log() - t_last.tan().log()) / (s.tan().log() - t.tan().log())
    return trig_ddim(x, s, t, None) + (s - t).sin() / (2 * r * s.sin()) * (D(x_last, t_last) - D(x, s))  # eq. 28


@pytest.mark.parametrize(
    ("sampler", "step"), [(ddim_sampler, trig_ddim), (dpm_solver_2s, trig_dpm), (dpm_solver_pp_2m, trig_dpm_pp)]
)
def test_trigflow_forms(sampler: Callable[..., Tensor], step: Callable[..., Tensor]) -> None:
    """Step by step on the circle, by the paper's formulas, as far as sigma_min."""
    denoiser = ToyDenoiser(curved)
    sigmas = EDM_SAMPLER.sigmas(denoiser, 8, 0.05, 20.0)
    sampler(denoiser, NOISE, sigmas=sigmas)
    times = sigma_to_time(sigmas[:-1], SIGMA_DATA)
    x, last = times[0].cos() * 20.0 * NOISE, None
    for s, t in pairwise(times):
        x, last = step(x, s, t, last), (x, s)
    torch.testing.assert_close(x / times[-1].cos(), denoiser.images[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_official_samplers_are_followed(sampler: Callable[..., Tensor]) -> None:
    class Narrow(ToyDenoiser):
        sigma_min, sigma_max = 0.02, 10.0

    for official in (EDM_SAMPLER, EDM2_SAMPLER):
        denoiser = Narrow(gaussian)
        x = sampler(denoiser, NOISE, sigmas=official.sigmas(denoiser, 5))
        assert x.dtype == official.dtype
        assert float(denoiser.images[0].abs().max()) == pytest.approx(
            float(NOISE.abs().max()) * (10 if official is EDM_SAMPLER else 80)
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_has_the_labels_and_a_level_of_the_network(sampler: Callable[..., Tensor]) -> None:
    labels = torch.eye(2)

    class Stepped(ToyDenoiser):
        def round_sigma(self, sigma: Tensor) -> Tensor:
            return (sigma * 64).round() / 64

        def __call__(self, x: Tensor, sigma: Tensor, given: Tensor | None = None) -> Tensor:
            assert given is labels
            return super().__call__(x, sigma, given)

    denoiser = Stepped(gaussian)
    x = sampler(denoiser, NOISE, labels, sigmas=EDM_SAMPLER.sigmas(denoiser, 4, 0.5, 20.0))
    torch.testing.assert_close(x, gaussian(denoiser.images[-1], denoiser.sigmas[-1]))  # the last step is DDIM's
    assert all(sigma == denoiser.round_sigma(sigma) for sigma in denoiser.sigmas)
    assert len(set(map(float, denoiser.sigmas))) > 3
