"""SiDA against its official code's equations, written naively in EDM's notation, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import NoiseRange
from edmdistill.methods.sida import SiDA, SiDAConfig
from edmdistill.trigflow import cos_sin, sigma_to_time

Make = Callable[..., Any]
SD = 0.5


def scaled(network: Any, x: Tensor, sigma: Tensor, labels: Tensor, **judged: str) -> tuple[Tensor, Tensor]:
    """D(x; sigma) of data x = x0 + sigma n, and the logits."""
    t = sigma_to_time(sigma, SD)
    cos, sin = cos_sin(t, x)
    out = network(cos * x, t, labels, **judged)
    F, logits = out if isinstance(out, tuple) else (out, None)
    return cos * (cos * x) - sin * SD * F, logits


NAMES = "sigma_init", "P_mean", "P_std", "r_s_max", "alpha", "gan", "gan_auxiliary"
OFFICIAL = dict(zip(NAMES, (2.5, -1.2, 1.2, 0.8, 1.0, 1e-4, 1.0), strict=True))
OTHERS = dict(zip(NAMES, (1.5, -0.6, 0.9, 0.7, 1.3, 0.01, 0.5), strict=True))


@pytest.mark.parametrize("options", [{}, OTHERS], ids=["defaults", "others"])
def test_the_losses_are_the_official_codes(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange, options: dict[str, float]
) -> None:
    assert SiDA.roles["auxiliary"].head == "mean"  # a logit a pixel
    networks, batch = tiny_networks(SiDA), tiny_batch(8)
    teacher, generator, psi = (networks[role] for role in ("teacher", "generator", "auxiliary"))
    method = SiDA(SiDAConfig(gan_warmup_images=10, **options), networks, noise)
    of_psi, of_generator = method.turns()
    sigma_init, P_mean, P_std, r_s_max, alpha, gan, gan_auxiliary = (OFFICIAL | options).values()
    init = torch.full((8,), sigma_init, dtype=torch.float64)

    draws = Draws(0, 8)
    y = scaled(generator, sigma_init * draws.normal_like(batch.x0), init, batch.labels)[0].detach()
    sigma = (draws.normal() * P_std + P_mean).exp()
    n = sigma.reshape(-1, 1, 1, 1) * draws.normal_like(batch.x0)
    y_fake, fake = scaled(psi, y + n, sigma, batch.labels, logits="also")
    _, real = scaled(psi, batch.x0 + n, sigma, batch.labels, logits="also")
    weight = ((sigma**2 + SD**2) / (sigma * SD) ** 2).reshape(-1, 1, 1, 1)
    bce = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean(1)
    mean_weight = math.exp(-2 * P_mean + 2 * P_std**2) + 1 / SD**2  # of the distribution; the code has the batch's
    loss_cls = gan_auxiliary * mean_weight * bce / 2
    expected = (weight * (y_fake - y).square()).sum((1, 2, 3)) + loss_cls
    found = of_psi.loss(batch, Draws(0, 8))
    compare(psi, found.value, SD**2 * expected)
    real, fake = real.detach(), fake.detach()
    right = torch.cat([real.mean(1) > 0, fake.mean(1) < 0]).double().mean()
    torch.testing.assert_close(
        found.signals, {"logits_real": real.mean(), "logits_fake": fake.mean(), "gan_accuracy": right}
    )

    for images, lsg_gan in ((0, 0.0), (10, 100 * gan)):
        draws = Draws(1, 8)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigma = (high + (1 - r_s_max * draws.uniform()) * (low - high)) ** 7
        y, _ = scaled(generator, sigma_init * draws.normal_like(batch.x0), init, batch.labels)
        n = sigma.reshape(-1, 1, 1, 1) * draws.normal_like(batch.x0)
        y_real, _ = scaled(teacher, y + n, sigma, batch.labels)
        y_fake, logits = scaled(psi, y + n, sigma, batch.labels, logits="also")
        size = (y - y_real).abs().mean((1, 2, 3), keepdim=True).detach()
        gap = y_real - y_fake
        loss = 100 * (gap * ((y_real - y) - alpha * gap) / size).sum((1, 2, 3))
        loss = loss - lsg_gan * y[0].numel() * logits.sigmoid().log().mean(1) / size.flatten()
        value = of_generator.loss(batch._replace(images=images), Draws(1, 8)).value
        compare(generator, value, loss / 100)


def compare(network: torch.nn.Module, found: Tensor, expected: Tensor) -> None:
    """Per image, and the gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(loss.mean(), list(network.parameters())) for loss in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_logits_of_generated_images_are_clipped_at_10(noise: NoiseRange) -> None:
    def loss(logit: float) -> Tensor:
        def psi(x: Tensor, s: Tensor, labels: None, logits: str) -> tuple[Tensor, Tensor]:
            return 0.1 * x, torch.full((len(x), 3), logit)

        networks = {"teacher": lambda x, s, labels: 0.2 * x, "generator": None, "auxiliary": psi}
        x, v = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        return SiDA(SiDAConfig(), networks, noise).score_loss(1.0, x, v, torch.full((4,), 0.8), None).value

    assert torch.equal(loss(-50.0), loss(-10.0))
    assert torch.equal(loss(50.0), loss(10.0))
    assert bool((loss(-10.0) > loss(-9.0)).all())


def test_the_adversary_is_bounded_where_the_teacher_is_right(noise: NoiseRange) -> None:
    """There D* = g, and its weight is D / 1e-5."""

    def psi(x: Tensor, s: Tensor, labels: None, logits: str) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.zeros(len(x), 3)

    networks = {"teacher": lambda x, s, labels: 2 * x, "generator": None, "auxiliary": psi}
    x = torch.ones(4, 3, 2, 2)
    loss = SiDA(SiDAConfig(), networks, noise).score_loss(1e-5, x, SD * 2 * x, torch.full((4,), 0.8), None)
    torch.testing.assert_close(loss.value, torch.full((4,), 12 * math.log(2)))


@pytest.mark.parametrize("options", [{"P_std": 20.0}, {"P_mean": -50.0}])
def test_a_weight_that_overflows_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^the weight of the logits' loss, .* overflows at e\^[\d.]+: choose a"):
        SiDAConfig(**options)
    assert torch.tensor(math.exp(SiDAConfig(P_std=6.2).exponent)).isfinite()
