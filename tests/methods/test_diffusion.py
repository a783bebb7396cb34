"""Diffusion's loss against EDM's and, for Gaussian data, against the F that is known to be best."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import diffusion
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.diffusion import Diffusion, DiffusionConfig

Make = Callable[..., Any]
SD = 0.5


def test_the_loss_is_edms(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """lambda(sigma) |D(x0 + sigma n; sigma) - x0|^2, ln sigma ~ N(P_mean, P_std^2)."""
    networks, batch = tiny_networks(Diffusion), tiny_batch()
    loss = Diffusion(DiffusionConfig(P_mean=-0.4, P_std=1.0), networks, noise).velocity_loss(
        batch, Draws(7, len(batch.x0))
    )
    draws = Draws(7, len(batch.x0))
    sigma, n = (draws.normal() - 0.4).exp(), draws.normal_like(batch.x0)
    wide = sigma.reshape(-1, 1, 1, 1)
    x, length = batch.x0 + wide * n, (wide**2 + SD**2).sqrt()
    F = networks["teacher"](x * SD / length, (sigma / SD).atan(), batch.labels)
    D = SD**2 / length**2 * x - wide * SD / length * F
    expected = (sigma**2 + SD**2) / (sigma * SD) ** 2 * (D - batch.x0).square().sum((1, 2, 3))
    torch.testing.assert_close(loss.value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.t, (sigma / SD).atan())


@pytest.mark.parametrize("sigma", [0.002, 0.3, 2.5, 80.0])
def test_the_best_f_of_gaussian_data_has_no_gradient(
    gaussian_flow: Make,
    cubature: Make,
    scripted: Make,
    noise: NoiseRange,
    monkeypatch: pytest.MonkeyPatch,
    sigma: float,
) -> None:
    L = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, covariance = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64), 0.1 * L @ L.T
    best = gaussian_flow(mean, covariance)
    W = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def F(x_t: Tensor, t: Tensor, labels: None) -> Tensor:
        return best(x_t, t) + (x_t.flatten(1) @ W + b).reshape(x_t.shape)

    # The mean over these points of x0 and z is the expectation: the loss is quadratic in both.
    x0, z = cubature(2, 3)
    x0 = (mean + x0.flatten(1) @ torch.linalg.cholesky(covariance).T).reshape(x0.shape)
    levels = torch.full((len(x0),), sigma, dtype=torch.float64)
    monkeypatch.setattr(diffusion, "lognormal_times", lambda *_, **__: (levels / SD).atan())
    method = Diffusion(DiffusionConfig(), {"teacher": F}, noise)
    value = method.velocity_loss(Batch(x0, None), scripted(z)).value.mean()
    for slope in torch.autograd.grad(value, [W, b]):
        assert slope.abs().max() < 1e-12

    # What is left is the variance of v / sigma_data given x_t, in closed form.
    t = torch.tensor(sigma / SD, dtype=torch.float64).atan()
    eye = torch.eye(3, dtype=torch.float64)
    V = t.cos() ** 2 * covariance + t.sin() ** 2 * SD**2 * eye
    variance = torch.trace(covariance @ torch.linalg.inv(V))
    torch.testing.assert_close(value.detach(), variance, rtol=1e-9, atol=0)


def test_adaptive_weighting_is_least_where_u_is_the_log_of_the_loss(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """d/du (e^-u L/D + u) = 0 at u = ln(L/D); and F's gradient is the plain one, over D e^u."""
    F, batch = tiny_networks(Diffusion)["teacher"], tiny_batch()

    def value(u: Tensor | None) -> Tensor:
        def teacher(x_t: Tensor, t: Tensor, labels: Tensor, u_at: tuple[Tensor, ...] = ()) -> object:
            assert len(u_at) == (u is not None)
            return (F(x_t, t, labels), u) if u_at else F(x_t, t, labels)

        config = DiffusionConfig(weighting="none" if u is None else "adaptive")
        return Diffusion(config, {"teacher": teacher}, noise).velocity_loss(batch, Draws(7, len(batch.x0))).value

    plain = value(None)
    D = batch.x0[0].numel()
    u = (plain.detach() / D).log().requires_grad_()
    loss = value(u)
    torch.testing.assert_close(loss, 1 + u)
    weights = [*F.hidden.parameters(), *F.out.parameters()]
    slope = torch.autograd.grad(loss.sum(), [u, *weights])
    assert slope[0].abs().max() < 1e-12
    expected = torch.autograd.grad((plain / plain.detach()).sum(), weights)
    torch.testing.assert_close(slope[1:], expected)
