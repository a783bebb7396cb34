"""ECT: its loss and gradient against the paper's equations in EDM's scale, and its mapping of noise levels."""

import math
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, Toy, over
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.ect import ECT, ECTConfig
from edmdistill.methods.pairs import paired_sigma
from edmdistill.schedules import edm_curve, lognormal_sigmas, neighbor_sigmas

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)


def make(weight: Tensor, **options: Any) -> ECT:
    network = Toy(lambda x, t: weight * torch.sin(2 * x) * over(x, t).cos())
    return ECT(ECTConfig(**options), {"generator": network}, NOISE)


def ect_pair(draws: Draws, stage: int) -> tuple[Tensor, Tensor]:
    t = lognormal_sigmas(draws, P_mean=-1.1, P_std=2.0)
    return t, (t * (1 - (1 + 8 / (1 + t.exp())) * max(0.25 ** (stage + 1), 2**-20))).clamp(min=0)


def ict_pair(draws: Draws, stage: int) -> tuple[Tensor, Tensor]:
    """iCT's curriculum, grid and distribution, row by row, by its equations."""
    N = min(10 * 4**stage, 1280)
    levels = [0.0] + [(0.002 ** (1 / 7) + i / N * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(1, N + 1)]
    below = [0.0] + [1 + math.erf((math.log(level) + 1.1) / (2**0.5 * 2.0)) for level in levels[1:]]
    pairs = []
    for u in draws.uniform().tolist():
        i = next(i for i in range(1, N + 1) if u * below[-1] <= below[i])
        pairs.append((levels[i], levels[i - 1]))
    t, r = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return t, r


@pytest.mark.parametrize("images", [0, 299, 1000])
@pytest.mark.parametrize(
    ("weighting", "c", "intervals"),
    [("gap", 0.0, None), ("c_out", 0.06, None), ("gap", 0.03, (10, 1280))],
    ids=["ECT", "ECT on ImageNet", "iCT"],
)
def test_loss_and_gradient_are_the_paper_s(
    images: int, weighting: str, c: float, intervals: tuple[int, int] | None
) -> None:
    """f(x, sigma) = c_skip x + c_out F(c_in x), as the papers have it; a pair's images share their noise."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = make(weight, q=4.0, stage_images=100, c=c, weighting=weighting, intervals=intervals)
    x0 = STD * Draws(1, 6).normal(3, 4, 4)
    loss = method.consistency_loss(Batch(x0, None, images), Draws(0, 6))
    (gradient,) = torch.autograd.grad(loss.value.sum(), [weight])

    draws = Draws(0, 6)
    t, r = (ect_pair if intervals is None else ict_pair)(draws, images // 100)
    eps = draws.normal(3, 4, 4)

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        F = method.networks["generator"](x / scale * SIGMA_DATA, (sigma / SIGMA_DATA).atan())
        return SIGMA_DATA**2 / scale**2 * x - SIGMA_DATA * sigma / scale * F

    with torch.no_grad():
        target = torch.where(r.reshape(-1, 1, 1, 1) > 0, f(x0 + r.reshape(-1, 1, 1, 1) * eps, r), x0)
    error = f(x0 + t.reshape(-1, 1, 1, 1) * eps, t) - target
    distance = (error.square().sum((1, 2, 3)) + c**2).sqrt() - c
    expected = distance / (t - r) if weighting == "gap" else (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2 * distance
    torch.testing.assert_close(loss.value, expected, rtol=1e-9, atol=1e-9)
    (by_hand,) = torch.autograd.grad(expected.sum(), [weight])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=1e-9)


def test_neighbors_lie_in_the_teacher_s_range() -> None:
    law = {"P_mean": -1.1, "P_std": 2.0}
    method = ECT(ECTConfig(intervals=(10, 20)), {}, NoiseRange(SIGMA_DATA, 0.02, 8.0))
    expected = neighbor_sigmas(Draws(0, 40), 10, 0.02, 8.0, **law)
    assert all(map(torch.equal, method.draw_pair(0, Draws(0, 40)), expected))


@pytest.mark.parametrize("P_mean", [-1.1, 3.0])
def test_neighbors_are_drawn_by_the_normal_law_between_them(P_mean: float) -> None:
    rows, N = 40_000, 6
    t, r = neighbor_sigmas(Draws(0, rows), N, 0.002, 80.0, P_mean=P_mean, P_std=2.0)
    levels = torch.cat(
        [torch.zeros(1, dtype=torch.float64), edm_curve(torch.arange(1, N + 1, dtype=torch.float64) / N, 0.002, 80.0)]
    )
    below = torch.special.ndtr((levels.log() - P_mean) / 2)
    for i in range(N):
        at = t.isclose(levels[i + 1])
        torch.testing.assert_close(r[at], levels[i].expand(int(at.sum())))
        assert float(at.double().mean()) == pytest.approx(float((below[i + 1] - below[i]) / below[-1]), abs=0.01)


def test_intervals_that_decrease_are_refused() -> None:
    with pytest.raises(ValueError, match="decreases"):
        ECTConfig(intervals=(20, 10))


def test_pairs_close_in_and_begin_at_the_data() -> None:
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    stages = torch.stack([paired_sigma(sigma, 2.0**-stage, 8.0, 1.0) for stage in (1, 2, 4, 8, 16)])
    assert (stages.diff(dim=0) >= 0).all()
    assert (stages < sigma).all()
    assert (stages[0, sigma < 0.1] == 0).all()  # diffusion training at first, where 5/2 > 1
    torch.testing.assert_close(stages[-1], sigma, rtol=1e-3, atol=0)
    assert float(paired_sigma(sigma[-1:], 0.5, 8.0, 1.0)) == pytest.approx(50.0, rel=1e-3)


def test_a_late_stage_still_has_a_gradient() -> None:
    weight = torch.tensor(0.7, requires_grad=True)
    loss = make(weight, stage_images=1).consistency_loss(Batch(torch.randn(4, 1, 4, 4), None, 10**9), Draws(0, 4))
    loss.value.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()
    assert weight.grad != 0


def test_options_of_one_kind_of_pairs_are_not_ignored_by_the_other() -> None:
    with pytest.raises(ValueError, match=r"with intervals, k has no effect: leave out intervals, or k = 8\.0"):
        ECTConfig(intervals=(10, 20), k=4.0)


def test_how_fast_pairs_narrow_matters_where_they_are_wider_at_all() -> None:
    assert ECTConfig(b=2.0).b == 2
    with pytest.raises(ValueError, match="set k above 0"):
        ECTConfig(k=0.0, b=2.0)
