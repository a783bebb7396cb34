"""Heun's sampler: the official samples of a toy denoiser, its order, its cost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_denoisers import SIGMA_DATA, ToyDenoiser, curved, gaussian

from edmdistill.sampling.heun import EDM2_SAMPLER, EDM_SAMPLER, Churn, OfficialSampler, edm_sampler


def recorded(noise: Tensor) -> Callable[[Tensor], Tensor]:
    draws = iter(noise)
    return lambda x: next(draws)


def churn_of(case: dict[str, float]) -> Churn:
    return Churn(case.get("S_churn", 0), case.get("S_min", 0), case.get("S_max", float("inf")), case.get("S_noise", 1))


@pytest.mark.parametrize("name", ["edm", "edm_churn", "ab_heun_edm", "ab_default_edm"])
def test_edm_golden(golden: Path, name: str) -> None:
    case = json.loads((golden / "toy-samplers-edm.json").read_text())["cases"][name]
    tensors = load_file(golden / "toy-samplers-edm.safetensors")
    denoiser = ToyDenoiser(curved)
    noise = tensors.get(f"{name}.noise", torch.zeros(18, *tensors["latents"].shape))
    x = edm_sampler(
        denoiser,
        tensors["latents"],
        sigmas=EDM_SAMPLER.sigmas(denoiser),
        churn=churn_of(case),
        randn_like=recorded(noise),
    )
    torch.testing.assert_close(x, tensors[f"{name}.x"], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.stack(denoiser.sigmas), tensors[f"{name}.net_sigmas"], rtol=1e-12, atol=0)
    assert len(denoiser.sigmas) == case["net_calls"]


EDM2_CASES = [f"edm2{case}_{dtype}" for case in ("", "_guided", "_churn") for dtype in ("float32", "float64")]


@pytest.mark.parametrize("name", EDM2_CASES)
def test_edm2_golden(golden: Path, name: str) -> None:
    case = json.loads((golden / "toy-samplers-edm2.json").read_text())["cases"][name]
    tensors = load_file(golden / "toy-samplers-edm2.safetensors")
    dtype = getattr(torch, case["dtype"])
    weight = case.get("guidance", 1.0)
    denoiser = ToyDenoiser(lambda x, sigma: (0.8 * curved(x, sigma) - 0.05).lerp(curved(x, sigma), weight))
    noise = tensors.get(f"{name}.noise", torch.zeros(0))
    x = edm_sampler(
        denoiser,
        tensors["latents"],
        sigmas=replace(EDM2_SAMPLER, dtype=dtype).sigmas(denoiser, case["num_steps"]),
        churn=churn_of(case),
        always_draws=False,
        randn_like=recorded(noise),
    )
    atol = 1e-9 if dtype == torch.float64 else 1e-5 * float(tensors[f"{name}.x"].abs().max())
    torch.testing.assert_close(x, tensors[f"{name}.x"], rtol=0, atol=atol)
    sigmas = torch.stack(denoiser.sigmas).to(torch.float64)
    torch.testing.assert_close(
        sigmas, tensors[f"{name}.net_sigmas"], rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0
    )


def test_heun_is_of_second_order() -> None:
    """Down to sigma_min the solution for Gaussian data is known, and the error falls with the square of the step."""
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma_min, sigma_max = 0.5, 4.0

    def error(num_steps: int) -> float:
        # The last call, at sigma_min, is Euler's jump to 0 from where the solution was: what it saw is compared.
        seen: list[Tensor] = []
        denoiser = ToyDenoiser(lambda x, sigma: (seen.append(x), gaussian(x, sigma))[1])
        edm_sampler(denoiser, noise, sigmas=EDM_SAMPLER.sigmas(denoiser, num_steps, sigma_min, sigma_max))
        exact = noise * sigma_max * ((SIGMA_DATA**2 + sigma_min**2) / (SIGMA_DATA**2 + sigma_max**2)) ** 0.5
        return float((seen[-1] - exact).abs().max())

    ratio = error(33) / error(65)
    assert 3.8 < ratio < 4.3


def test_one_step_is_the_denoiser() -> None:
    noise = torch.randn(2, 1, 4, 4)
    denoiser = ToyDenoiser(gaussian)
    x = edm_sampler(denoiser, noise, sigmas=EDM_SAMPLER.sigmas(denoiser, 1))
    torch.testing.assert_close(x, gaussian(80.0 * noise.double(), torch.tensor(80.0)))


def test_levels_fit_the_network() -> None:
    class Narrow(ToyDenoiser):
        sigma_min, sigma_max = 0.02, 10.0

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return (sigma * 64).round() / 64

    noise = torch.randn(1, 1, 2, 2)
    for official in (EDM_SAMPLER, EDM2_SAMPLER):
        denoiser = Narrow(gaussian)
        edm_sampler(denoiser, noise, sigmas=official.sigmas(denoiser, 8), churn=Churn(4))
        sigmas = torch.stack(denoiser.sigmas)
        assert torch.equal(sigmas, denoiser.round_sigma(sigmas))
        assert bool((sigmas <= 10 * 2**0.5).all()) == official.clamps == (official is EDM_SAMPLER)


@pytest.mark.parametrize(("churn", "count"), [(Churn(), 0), (Churn(40, 0.05, 50), 9)])
@pytest.mark.parametrize("official", [EDM_SAMPLER, EDM2_SAMPLER])
def test_when_noise_is_drawn(official: OfficialSampler, churn: Churn, count: int) -> None:
    drawn: list[Tensor] = []

    def randn_like(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    noise = torch.randn(1, 1, 2, 2)
    denoiser = ToyDenoiser(gaussian)
    edm_sampler(
        denoiser,
        noise,
        sigmas=official.sigmas(denoiser, 12),
        churn=churn,
        always_draws=official.always_draws,
        randn_like=randn_like,
    )
    assert len(drawn) == (12 if official is EDM_SAMPLER and churn.strength else count)


def test_churn_includes_its_ends() -> None:
    """At 4 and at 2 it raises the level by the strength's share of the steps, 1 / 4."""
    denoiser, sigmas = ToyDenoiser(gaussian), torch.tensor([8.0, 4, 2, 1, 0], dtype=torch.float64)

    def seen(churn: Churn) -> list[float]:
        denoiser.sigmas.clear()
        noise = torch.randn(1, 1, 2, 2)
        edm_sampler(denoiser, noise, sigmas=sigmas, churn=churn, always_draws=False, randn_like=torch.zeros_like)
        return [float(sigma) for sigma in denoiser.sigmas]

    assert seen(Churn(1, 2, 4)) == [8, 4, 5, 2, 2.5, 1, 1]
    assert seen(Churn(1, 2, 2)) == [8, 4, 4, 2, 2.5, 1, 1]
