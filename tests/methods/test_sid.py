"""SiD is CoSIM with one starting level, no data and an auxiliary score of one time: shown number for number.

What CoSIM's losses are is tested in test_cosim.py and test_semi_implicit.py.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from edmdistill import schedules
from edmdistill.draws import Draws
from edmdistill.methods import cosim
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, CoSIMConfig
from edmdistill.methods.sid import SiD, SiDConfig
from edmdistill.trigflow import cos_sin

Make = Callable[..., Any]


def draws(size: int = 6) -> Draws:
    return Draws(3, size)


@pytest.mark.parametrize("role", ["auxiliary", "generator"])
@pytest.mark.parametrize(
    "options", [{"alpha": 1.2, "coef": 0.5}, {"alpha": 1.0, "coef": 0.75, "weight": "c_out"}], ids=str
)
def test_sid_is_cosim_of_one_level(
    tiny_networks: Make,
    tiny_batch: Make,
    noise: NoiseRange,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    options: dict[str, Any],
) -> None:
    networks, batch = tiny_networks(SiD), tiny_batch()

    def one_level(draws: Draws, **_: float) -> tuple[Tensor, Tensor]:
        if role == "auxiliary":
            sigma_s = schedules.lognormal_sigmas(draws, P_mean=-1.2, P_std=1.2)
        else:
            sigma_s = schedules.edm_curve(0.8 * draws.uniform(), 0.002, 80.0)
        return sigma_s, torch.full((len(draws),), 2.5, dtype=torch.float64)

    def one_time(x_s: Tensor, s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        return networks["auxiliary"](x_s, s, labels)

    monkeypatch.setattr(cosim, "cosim_sigmas", one_level)
    methods = (
        (SiD(SiDConfig(**options), networks, noise), batch),
        (
            CoSIM(CoSIMConfig(**options), {**networks, "auxiliary": one_time}, noise),
            Batch(torch.zeros_like(batch.x0), batch.labels),
        ),
    )
    losses = [next(t for t in method.turns() if t.role == role).loss(data, draws()) for method, data in methods]
    parameters = list(networks[role].parameters())
    slopes = [torch.autograd.grad(loss.value.mean(), parameters) for loss in losses]
    for mine, theirs in zip([*losses[0][:2], *slopes[0]], [*losses[1][:2], *slopes[1]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_pixels_of_the_data_do_not_count(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    method, batch = SiD(SiDConfig(), tiny_networks(SiD), noise), tiny_batch()
    elsewhere = Batch(torch.full_like(batch.x0, torch.nan), batch.labels)
    for turn in method.turns():
        assert (turn.loss(batch, draws()).value == turn.loss(elsewhere, draws()).value).all()


def test_the_generator_starts_from_one_level(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    networks = tiny_networks(SiD)

    def generator(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append((x_t, t))
        return networks["generator"](x_t, t, labels)

    method = SiD(SiDConfig(sigma_init=1.5), {**networks, "generator": generator}, noise)
    for turn in method.turns():
        turn.loss(tiny_batch(4000), draws(4000))
    for x_t, t in seen:
        torch.testing.assert_close(0.5 * t.tan(), torch.full((4000,), 1.5, dtype=torch.float64))
        # 1.5 n in EDM's scale: 16000 draws give its standard deviation to .6 %.
        assert float((x_t / cos_sin(t, x_t)[0]).std()) == pytest.approx(1.5, rel=0.02)


def test_coef_of_a_half_is_denoising_score_matching(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """lambda(sigma) |D_psi(g + sigma eps) - g|^2, whatever the teacher says."""
    networks = tiny_networks(SiD)
    seen: dict[str, Tensor] = {}

    def generator(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        F = networks["generator"](x_t, t, labels)
        cos, sin = cos_sin(t, x_t)
        seen["g"] = cos * x_t - sin * 0.5 * F
        return F

    def auxiliary(x_s: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        F = networks["auxiliary"](x_s, s, labels)
        cos, sin = cos_sin(s, x_s)
        seen["D"] = cos * x_s - sin * 0.5 * F
        return F

    def teacher(x_s: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(x_s, 1e6)

    method = SiD(SiDConfig(), {"teacher": teacher, "generator": generator, "auxiliary": auxiliary}, noise)
    loss = method.auxiliary_loss(tiny_batch(), draws())
    sigma = 0.5 * loss.t.tan()
    edm_weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    error = (seen["D"] - seen["g"]).square().sum((1, 2, 3))
    torch.testing.assert_close(loss.value, 0.25 * edm_weight * error, rtol=1e-9, atol=0)


def test_no_gradient_where_the_auxiliary_score_is_the_teachers(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    networks = tiny_networks(SiD)
    method = SiD(SiDConfig(), {**networks, "auxiliary": networks["teacher"]}, noise)
    value = method.generator_loss(tiny_batch(), draws()).value
    assert (value == 0).all()
    slopes = torch.autograd.grad(value.sum(), list(networks["generator"].parameters()))
    assert max(slope.abs().max() for slope in slopes) < 1e-12


def test_sid_has_no_warning_about_its_own_alpha_and_coef(tiny_networks: Make, noise: NoiseRange) -> None:
    assert SiDConfig() == SiDConfig(alpha=1.2, coef=0.5, sigma_init=2.5, P_mean=-1.2, P_std=1.2, r_s_max=0.8)
    assert SiD(SiDConfig(), tiny_networks(SiD), noise).notes() == ()


@pytest.mark.parametrize(
    "options", [{"alpha": 0}, {"coef": 0.49}, {"sigma_init": 0}, {"P_std": 0}, {"r_s_max": 2}, {"R": 4}], ids=str
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, SiDConfig)
