"""SiDA against its official code's equations, written naively in EDM's notation, in float64."""

import math
from collections.abc import Callable
from typing import Any

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


def test_the_losses_are_the_official_codes(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    networks, batch = tiny_networks(SiDA), tiny_batch(8)
    teacher, generator, psi = (networks[role] for role in ("teacher", "generator", "auxiliary"))
    method = SiDA(SiDAConfig(gan_warmup_images=10), networks, noise)
    of_psi, of_generator = method.turns()
    init = torch.full((8,), 2.5, dtype=torch.float64)

    draws = Draws(0, 8)
    y = scaled(generator, 2.5 * draws.normal_like(batch.x0), init, batch.labels)[0].detach()
    sigma = (draws.normal() * 1.2 - 1.2).exp()
    n = sigma.reshape(-1, 1, 1, 1) * draws.normal_like(batch.x0)
    y_fake, fake = scaled(psi, y + n, sigma, batch.labels, logits="also")
    _, real = scaled(psi, batch.x0 + n, sigma, batch.labels, logits="also")
    weight = ((sigma**2 + SD**2) / (sigma * SD) ** 2).reshape(-1, 1, 1, 1)
    bce = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean(1)
    mean_weight = math.exp(2 * 1.2 + 2 * 1.2**2) + 1 / SD**2  # of the distribution, where the code has the batch's
    expected = (weight * (y_fake - y).square()).sum((1, 2, 3)) + mean_weight * bce / 2
    compare(psi, of_psi.loss(batch, Draws(0, 8)).value, SD**2 * expected)

    for images, lsg_gan in ((0, 0.0), (10, 0.01)):
        draws = Draws(1, 8)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigma = (high + (1 - 0.8 * draws.uniform()) * (low - high)) ** 7
        y, _ = scaled(generator, 2.5 * draws.normal_like(batch.x0), init, batch.labels)
        n = sigma.reshape(-1, 1, 1, 1) * draws.normal_like(batch.x0)
        y_real, _ = scaled(teacher, y + n, sigma, batch.labels)
        y_fake, logits = scaled(psi, y + n, sigma, batch.labels, logits="also")
        size = (y - y_real).abs().mean((1, 2, 3), keepdim=True).detach()
        loss = 100 * ((y_real - y_fake) * ((y_real - y) - (y_real - y_fake)) / size).sum((1, 2, 3))
        loss = loss - lsg_gan * y[0].numel() * logits.sigmoid().log().mean(1) / size.flatten()
        found = of_generator.loss(batch._replace(images=images), Draws(1, 8)).value
        compare(generator, found, loss / 100)


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
