"""TCM: its loss and gradient against the paper's equations in EDM's scale, and its noise levels."""

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, Toy, over
from scipy import special
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.tcm import TCM, TCMConfig
from edmdistill.schedules import student_sigmas

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
ROWS = 40


def make(weight: Tensor, **options: object) -> TCM:
    generator = Toy(lambda x, t: weight * torch.sin(2 * x) * over(x, t).cos())
    first_stage = Toy(lambda x, t: 0.3 * torch.cos(x) * over(x, t).sin())
    return TCM(TCMConfig(**options), {"generator": generator, "teacher": first_stage}, NOISE)


@pytest.mark.parametrize(("weighting", "gap", "c"), [("gap", 0.001, 1e-8), ("c_out", 4.0**-4, 0.06), ("gap", 0.5, 0)])
def test_loss_and_gradient_are_the_paper_s(weighting: str, gap: float, c: float) -> None:
    """L_C + w_b L_B, each a mean over its own images, of f(x, sigma) = c_skip x + c_out F(c_in x).

    The first stage stands in below sigma' = 1.2; the shares of a batch are those that were drawn.
    """
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = make(weight, weighting=weighting, gap=gap, c=c, boundary=1.2, boundary_share=0.3, boundary_weight=0.2)
    x0 = STD * Draws(1, ROWS).normal(3, 4, 4)
    loss = method.truncated_loss(Batch(x0, None), Draws(0, ROWS))
    (gradient,) = torch.autograd.grad(loss.value.sum(), [weight])

    draws = Draws(0, ROWS)
    at_boundary = draws.uniform() < 0.3
    t = student_sigmas(draws, P_mean=0.0, P_std=0.2, degrees=0.01, low=1.2, high=80.0)
    t = torch.where(at_boundary, 1.2, t)
    eps = draws.normal(3, 4, 4)
    r = (t - t * gap * (1 + 8 / (1 + t.exp()))).clamp(min=0)

    def f(x: Tensor, sigma: Tensor, role: str) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        F = method.networks[role](x / scale * SIGMA_DATA, (sigma / SIGMA_DATA).atan())
        return SIGMA_DATA**2 / scale**2 * x - SIGMA_DATA * sigma / scale * F

    with torch.no_grad():
        x_r = x0 + r.reshape(-1, 1, 1, 1) * eps
        below = (r < 1.2).reshape(-1, 1, 1, 1)
        target = torch.where(below, f(x_r, r, "teacher"), f(x_r, r, "generator"))
    assert below.flatten()[at_boundary].all()
    assert gap == 0.5 or not below.all()
    error = f(x0 + t.reshape(-1, 1, 1, 1) * eps, t, "generator") - target
    distance = (error.square().sum((1, 2, 3)) + c**2).sqrt() - c
    c_out = t * SIGMA_DATA / (t**2 + SIGMA_DATA**2).sqrt()
    each = distance / (t - r) if weighting == "gap" else distance / c_out**2
    boundary, others = each[at_boundary], each[~at_boundary]
    expected = len(others) / 0.7 * others.mean() + 0.2 * len(boundary) / 0.3 * boundary.mean()
    torch.testing.assert_close(loss.value.sum(), expected, rtol=1e-9, atol=1e-9)
    (by_hand,) = torch.autograd.grad(expected, [weight])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-8, atol=1e-9)


def test_at_the_boundary_the_first_stage_is_a_fixed_point() -> None:
    """A generator that is the first stage loses nothing there but the distance of the first stage's own pair."""
    first = Toy(lambda x, t: 0.3 * x)
    method = TCM(TCMConfig(gap=2.0**-20, c=0.0), {"generator": first, "teacher": first}, NOISE)
    loss = method.truncated_loss(Batch(STD * torch.randn(ROWS, 1, 4, 4), None), Draws(0, ROWS))
    assert loss.value.isfinite().all()
    assert float(loss.signals["distance"]) < 1e-3


def test_noise_levels_end_at_the_teacher_s_highest() -> None:
    networks = make(torch.ones([]).double()).networks
    method = TCM(TCMConfig(), networks, NoiseRange(SIGMA_DATA, 0.002, 8.0))
    loss = method.truncated_loss(Batch(torch.zeros(400, 1, 2, 2).double(), None), Draws(0, 400))
    assert 4 < float((SIGMA_DATA * loss.t.tan()).max()) < 8.001


def test_student_sigmas_are_the_truncated_distribution() -> None:
    """Their logarithms have the truncated distribution function, few degrees of freedom or many."""
    rows = 20_000
    for degrees, center, low, high in ((0.01, 0.0, 1.0, 80.0), (3.0, 0.5, 0.01, 80.0), (1e6, -1.0, 0.002, 1.0)):
        sigma = student_sigmas(Draws(0, rows), P_mean=center, P_std=0.4, degrees=degrees, low=low, high=high)
        assert low <= float(sigma.min())
        assert float(sigma.max()) <= high
        ends = torch.tensor([low, high], dtype=torch.float64)
        T = (torch.cat([ends, sigma.sort().values]).log() - center) / 0.4
        below, above, *places = special.stdtr(degrees, T.numpy()).tolist()
        place = (torch.tensor(places, dtype=torch.float64) - below) / (above - below)
        assert float((place - (torch.arange(rows) + 0.5) / rows).abs().max()) < 1.95 / rows**0.5  # one in a thousand


def test_students_quantiles_are_close_to_the_exact_ones() -> None:
    """For the paper's options, within 1e-5."""
    law = {"P_mean": 0.0, "P_std": 0.2, "degrees": 0.01, "low": 1.0, "high": 80.0}
    log = student_sigmas(Draws(0, 2000), **law).log()
    first, last = special.stdtr(0.01, (torch.tensor([1.0, 80.0], dtype=torch.float64).log() / 0.2).numpy())
    exact = 0.2 * special.stdtrit(0.01, first + (last - first) * Draws(0, 2000).uniform().numpy())
    torch.testing.assert_close(log, torch.from_numpy(exact), rtol=0, atol=1e-5)
