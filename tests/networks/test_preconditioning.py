"""The four preconditionings: EDM's table 1, the TrigFlow algebra, and the ranges."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edmdistill.networks.preconditioning import EDM, IDDPM, PRECONDITIONINGS, VE, VP, Preconditioning
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import denoised, sigma_to_time


@pytest.fixture(params=PRECONDITIONINGS)
def preconditioning(request: pytest.FixtureRequest) -> Preconditioning:
    return PRECONDITIONINGS[request.param]()


def test_trigflow_algebra(preconditioning: Preconditioning) -> None:
    """F = a x_t + b F_raw gives the denoiser that c_skip and c_out give, from the same input of the network."""
    torch.manual_seed(0)
    sd = preconditioning.sigma_data
    sigma = edm_sigmas(50, preconditioning.sigma_min, preconditioning.sigma_max)
    x, raw = torch.randn(50, dtype=torch.float64) * (sigma + sd), torch.randn(50, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning.coefficients(sigma)
    t = sigma_to_time(sigma, sd)
    x_t = t.cos() * x
    a, b, c, c_noise_t = preconditioning.trigflow(t)
    torch.testing.assert_close(c * x_t, c_in * x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c_noise_t, c_noise, rtol=1e-9, atol=1e-9)
    F = (a * x_t + b * raw)[:, None]
    found = denoised(x_t[:, None], F, t, sd)[:, 0]
    torch.testing.assert_close(found, c_skip * x + c_out * raw, rtol=1e-11, atol=1e-11)


def test_numbers_make_it_again(preconditioning: Preconditioning) -> None:
    numbers = json.loads(json.dumps(asdict(preconditioning), allow_nan=False))
    assert type(preconditioning)(**numbers) == preconditioning


def test_edm_has_unit_variance() -> None:
    sigma = torch.logspace(-3, 3, 20, dtype=torch.float64)
    c_skip, c_out, c_in, _ = EDM(sigma_data=0.6).coefficients(sigma)
    torch.testing.assert_close(c_in**2 * (0.36 + sigma**2), torch.ones(20, dtype=torch.float64))
    # What F learns: (x0 - c_skip x) / c_out.
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.36 + c_skip**2 * sigma**2), c_out**2)


def test_noise_conditions() -> None:
    sigma = torch.tensor([0.02, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(EDM().c_noise(sigma), sigma.log() / 4)
    torch.testing.assert_close(EDM(c_noise_scale=250.0).c_noise(sigma), sigma.log() * 250)
    torch.testing.assert_close(VE().c_noise(sigma), (sigma / 2).log())
    # VP's condition is 999 t, and sigma(t) = sqrt(exp(19.9 t^2 / 2 + .1 t) - 1).
    t = VP().c_noise(sigma) / 999
    torch.testing.assert_close(((19.9 * t**2 / 2 + 0.1 * t).exp() - 1).sqrt(), sigma)


def test_ranges() -> None:
    assert (EDM().sigma_min, EDM().sigma_max, EDM().supported) == (0.002, 80, (0, math.inf))
    assert (VE().sigma_min, VE().sigma_max) == (0.02, 100)
    assert VP().supported == pytest.approx((0.0009765625, 152.1671), rel=1e-6)  # as stored in the golden file
    assert (VP().sigma_min, VP().sigma_max) == (0.002, 80)
    assert VP(sigma_min=1e-9, sigma_max=1e9).sigma_max == VP().supported[1]
    assert IDDPM().sigma_min == IDDPM().supported[0] == pytest.approx(0.0064223, rel=1e-5)
    assert IDDPM().sigma_max == 80


def test_ve_is_the_official_one(golden: Path) -> None:
    """On what the official network received and returned; the network is NCSN++, which is tested with its weights."""
    tensors = load_file(golden / "ve-ncsnpp-cond.safetensors")
    for case in ("case0", "case1", "case2"):
        x, sigma, F_x = (tensors[f"{case}.{name}"].float() for name in ("x", "sigma", "F_x"))
        c_skip, c_out, c_in, c_noise = VE().coefficients(sigma.reshape(-1, 1, 1, 1))
        torch.testing.assert_close(c_in * x, tensors[f"{case}.x_in"])
        torch.testing.assert_close(c_noise.flatten(), tensors[f"{case}.c_noise"])
        torch.testing.assert_close(c_skip * x + c_out * F_x, tensors[f"{case}.D_x"])


def test_iddpm_levels_are_the_official_buffer(golden: Path) -> None:
    from edmdistill.checkpoints.nvidia import read_official

    official = read_official(golden / "iddpm-adm-uncond.pkl.gz").tensors["u"]
    torch.testing.assert_close(IDDPM().levels, official, rtol=2e-6, atol=0)


def test_iddpm_rounds_to_the_nearest_level() -> None:
    iddpm = IDDPM()
    levels = iddpm.levels.double()
    torch.testing.assert_close(iddpm.round_sigma(levels[:-1] * 1.0001), levels[:-1], rtol=0, atol=0)
    assert iddpm.index(torch.tensor([[1e9, 0.0]])).tolist() == [[0, 1000]]
    middle = (levels[500] + levels[501]) / 2
    assert iddpm.round_sigma(middle * 1.0001) == levels[500]
    assert iddpm.round_sigma(middle * 0.9999) == levels[501]
    assert iddpm.c_noise(levels[500]) == 499


def test_iddpm_refuses_levels_without_end() -> None:
    with pytest.raises(ValueError, match="must be 1 to 10000, not"):
        IDDPM(M=10**9)


def test_the_others_round_nothing() -> None:
    sigma = torch.tensor([0.1234, 5.0])
    for preconditioning in (EDM(), VP(), VE()):
        assert preconditioning.round_sigma(sigma) is sigma
