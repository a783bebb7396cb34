"""ECT: its loss and gradient against the paper's equations in EDM's scale, and its mapping of noise levels."""

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, Toy, over
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.ect import ECT, ECTConfig
from edmdistill.methods.pairs import paired_sigma
from edmdistill.schedules import lognormal_sigmas

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)


def make(weight: Tensor, **options: float) -> ECT:
    network = Toy(lambda x, t: weight * torch.sin(2 * x) * over(x, t).cos())
    return ECT(ECTConfig(**options), {"generator": network}, NOISE)


@pytest.mark.parametrize("images", [0, 200, 1000])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_loss_and_gradient_are_the_paper_s(images: int, c: float) -> None:
    """f(x, sigma) = c_skip x + c_out F(c_in x), as the paper has it; its pairs of x share their noise."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = make(weight, q=4.0, stage_images=100, c=c)
    x0 = STD * Draws(1, 6).normal(1, 4, 4)
    loss = method.consistency_loss(Batch(x0, None, images), Draws(0, 6))
    (gradient,) = torch.autograd.grad(loss.value.sum(), [weight])

    draws = Draws(0, 6)
    t = lognormal_sigmas(draws, P_mean=-1.1, P_std=2.0)
    eps = draws.normal(1, 4, 4)
    r = (t * (1 - (1 + 8 / (1 + t.exp())) * max(0.25 ** (images // 100 + 1), 2**-20))).clamp(min=0)

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        F = method.networks["generator"](x / scale * SIGMA_DATA, (sigma / SIGMA_DATA).atan())
        return SIGMA_DATA**2 / scale**2 * x - SIGMA_DATA * sigma / scale * F

    with torch.no_grad():
        target = f(x0 + r.reshape(-1, 1, 1, 1) * eps, r)
    error = f(x0 + t.reshape(-1, 1, 1, 1) * eps, t) - target
    distance = (error.square().sum((1, 2, 3)) + c**2).sqrt() - c
    expected = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2 * distance
    torch.testing.assert_close(loss.value, expected, rtol=1e-9, atol=1e-9)
    (by_hand,) = torch.autograd.grad(expected.sum(), [weight])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=1e-9)


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
