"""The preconditionings: EDM's table 1, the TrigFlow algebra, and the ranges."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edmdistill.networks.preconditioning import (
    EDM,
    IDDPM,
    PRECONDITIONINGS,
    VE,
    VP,
    ConsistencyBoundary,
    Preconditioning,
)
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import denoised, sigma_to_time

CASES: dict[str, Callable[[], Preconditioning]] = {
    **PRECONDITIONINGS,
    "edm, t": partial(EDM, sigma_data=0.7, c_noise_kind="time"),
    "consistency, other": partial(ConsistencyBoundary, sigma_data=0.7, sigma_min=0.1, c_noise_scale=250.0),
    "vp, other": partial(VP, sigma_data=0.7, beta_d=15.0, beta_min=0.2, M=500, epsilon_t=1e-3),
    "iddpm, other": partial(IDDPM, sigma_data=0.7, C_1=0.01, C_2=0.02, M=50),
}


@pytest.fixture(params=CASES)
def preconditioning(request: pytest.FixtureRequest) -> Preconditioning:
    return CASES[request.param]()


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
    assert c_noise.dtype == torch.float64  # not float32 for having an integer's value
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
    torch.testing.assert_close(ConsistencyBoundary(c_noise_scale=250.0).c_noise(sigma), sigma.log() * 250)
    time = EDM(sigma_data=0.7, c_noise_kind="time")
    torch.testing.assert_close(time.c_noise(sigma), sigma_to_time(sigma, 0.7))
    assert [each.reads_time for each in (time, EDM(), VP())] == [True, False, False]


@pytest.mark.parametrize("preconditioning", ["vp", "vp, other"], indirect=True)
def test_vps_condition_is_its_time(preconditioning: VP) -> None:
    """(M - 1) t, where sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1); training goes from epsilon_t to 1."""
    vp = preconditioning
    low, high = vp.supported
    sigma = torch.tensor([low, 0.02, 1.0, 50.0, high], dtype=torch.float64)
    t = vp.c_noise(sigma) / (vp.M - 1)
    torch.testing.assert_close(((vp.beta_d * t**2 / 2 + vp.beta_min * t).exp() - 1).sqrt(), sigma)
    assert float(t[-1]) == pytest.approx(1, abs=1e-6)
    assert float(t[0]) == pytest.approx(vp.epsilon_t, abs=2**-23 / vp.beta_min)  # one rounding of exp in float32


def test_consistency_models_keep_the_image_at_sigma_min() -> None:
    """c_skip and c_out are EDM's of sigma - sigma_min, but for c_out's variance. Song et al. 2023, appendix C."""
    boundary = ConsistencyBoundary(sigma_data=0.7, sigma_min=0.1)
    above = torch.tensor([0.0, 0.3, 5.0], dtype=torch.float64)
    c_skip, c_out, c_in, _ = boundary.coefficients(0.1 + above)
    torch.testing.assert_close(c_skip, EDM(sigma_data=0.7).coefficients(above)[0])
    torch.testing.assert_close(c_in, EDM(sigma_data=0.7).coefficients(0.1 + above)[2])
    torch.testing.assert_close(c_out, 0.7 * above * c_in)
    assert (float(c_skip[0]), float(c_out[0])) == (1, 0)


@pytest.mark.parametrize(
    "levels",
    [
        {"sigma_data": 0.0},
        {"sigma_data": math.inf},
        {"sigma_min": 0.0},
        {"sigma_min": 3.0, "sigma_max": 3.0},
        {"sigma_max": math.inf},
    ],
    ids=str,
)
def test_levels_that_are_no_range_are_refused(levels: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="all must be positive and finite, and sigma_min below sigma_max"):
        EDM(**levels)


def test_ranges() -> None:
    assert (EDM().sigma_min, EDM().sigma_max, EDM().supported) == (0.002, 80, (0, math.inf))
    assert (VE().sigma_min, VE().sigma_max) == (0.02, 100)
    assert VP().supported == pytest.approx((0.0009765625, 152.1671), rel=1e-6)  # as stored in the golden file
    assert (VP().sigma_min, VP().sigma_max) == (0.002, 80)
    assert VP(sigma_min=1e-9, sigma_max=1e9).sigma_max == VP().supported[1]
    assert IDDPM().sigma_min == IDDPM().supported[0] == pytest.approx(0.0064223, rel=1e-5)
    assert IDDPM().sigma_max == 80


@pytest.mark.parametrize("class_", [VP, VE, IDDPM])
def test_what_predicts_the_noise_does_not_know_sigma_data(class_: type[Preconditioning]) -> None:
    """It is TrigFlow's alone; c_in is 1 / sqrt(1 + sigma^2), or 1 for VE."""
    sigma = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)
    own, other = (class_(sigma_data=sigma_data).coefficients(sigma) for sigma_data in (0.5, 0.7))
    torch.testing.assert_close(own, other, rtol=0, atol=0)
    torch.testing.assert_close(own[2] ** -2, sigma**0 if class_ is VE else 1 + sigma**2)


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


def test_iddpm_levels_in_closed_form() -> None:
    """1 + u_j^2 = a(M) / a(j), where the recursion is not limited by C_1, which is so between u_1 and u_0 alone."""
    M, C_1, C_2 = 50, 0.01, 0.02
    iddpm = IDDPM(C_1=C_1, C_2=C_2, M=M, sigma_max=1e9)
    a = (torch.arange(M + 1).double() / M / (C_2 + 1) * math.pi / 2).sin() ** 2
    u = (a[M] / a - 1).sqrt()
    u[0] = ((u[1] ** 2 + 1) / C_1 - 1).sqrt()
    torch.testing.assert_close(iddpm.levels.double(), u, rtol=1e-4, atol=1e-4)
    assert iddpm.supported == (float(iddpm.levels[M - 1]), float(iddpm.levels[0]))
    assert iddpm.sigma_max == iddpm.supported[1]
    # Levels count from the last; 0 is that of no noise, beyond the last.
    assert iddpm.c_noise(iddpm.levels[:3]).tolist() == [M - 1, M - 2, M - 3]


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
