"""LADD against FastGen's equations, written naively in EDM's notation, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.ladd import LADD, LADDConfig
from edmdistill.trigflow import cos_sin, sigma_to_time

Make = Callable[..., Any]
SD = 0.5
LOSSES = {  # of one real and one fake logit, and of one fake logit
    "hinge": (lambda real, fake: (1 - real).clamp(min=0) + (1 + fake).clamp(min=0), lambda fake: -fake),
    "log": (lambda real, fake: -real.sigmoid().log() - (1 - fake.sigmoid()).log(), lambda f: (1 - f.sigmoid()).log()),
    "non-saturating": (
        lambda real, fake: -real.sigmoid().log() - (1 - fake.sigmoid()).log(),
        lambda fake: -fake.sigmoid().log(),
    ),
}


class Naive:
    """The losses of a batch of 8, from the same random numbers in the same order."""

    def __init__(self, networks: dict[str, nn.Module], batch: Batch, draws: Draws, options: dict[str, Any]) -> None:
        self.networks, self.batch, self.draws, self.options = networks, batch, draws, options

    def noise(self) -> Tensor:
        return self.draws.normal_like(self.batch.x0)

    def generate(self) -> Tensor:
        """Rows start from sigma_max n, without data, or from data at one of the levels."""
        sigmas = (80.0, *self.options.get("levels", ()))
        u = self.draws.uniform().tolist()
        n, rows = self.noise(), []
        for i, share in enumerate(u):
            step = int(share * len(sigmas))
            sigma = torch.full((1,), sigmas[step], dtype=torch.float64)
            x = (self.batch.x0[i : i + 1] if step else 0.0) + sigma * n[i : i + 1]
            t = sigma_to_time(sigma, SD)
            cos, sin = cos_sin(t, x)
            F = self.networks["generator"](cos * x, t, self.batch.labels[i : i + 1])
            rows.append(cos * (cos * x) - sin * SD * F)
        return torch.cat(rows)

    def level(self) -> tuple[Tensor, Tensor]:
        """sigma [B], and noise of that level."""
        sigma = (self.draws.normal() * self.options.get("P_std", 1.0) + self.options.get("P_mean", 0.3)).exp()
        return sigma, sigma.reshape(-1, 1, 1, 1) * self.noise()

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Of features of one pixel: a linear map, a norm, SiLU, and a linear map for each level."""
        t = sigma_to_time(sigma, SD)
        features = self.networks["teacher"](cos_sin(t, x)[0] * x, t, self.batch.labels, features=True)
        if self.options.get("heads") == "bottleneck":
            features, heads = features[-1:], [self.networks["discriminator"]]
        else:
            heads = list(self.networks["discriminator"])
        columns = []
        for feature, head in zip(features, heads, strict=True):
            first, norm, _, last, _ = head
            y = feature.flatten(1) @ first.weight.flatten(1).T + first.bias
            groups = y.reshape(len(y), norm.num_groups, -1)
            centered = groups - groups.mean(2, keepdim=True)
            y = (centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()).flatten(1)
            y = y * norm.weight + norm.bias
            columns.append((y / (1 + (-y).exp())) @ last.weight.flatten(1).T + last.bias)
        return torch.cat(columns, 1)

    def discriminator(self) -> Tensor:
        g = self.generate().detach()
        sigma, n = self.level()
        self.sigma = sigma  # of generated images
        sigma_real, n_real = (sigma, n) if self.options.get("same_noise") else self.level()
        x0, r1 = self.batch.x0, self.options.get("r1", 0.0)
        real, fake = self.logits(x0 + n_real, sigma_real), self.logits(g + n, sigma)
        loss = LOSSES[self.options.get("gan_loss", "hinge")][0](real, fake)
        if r1:
            near = self.logits(x0 + n_real + 0.2 * self.noise(), sigma_real)
            loss = loss + r1 * (real - near) ** 2
        return loss.mean(1)

    def generator(self) -> Tensor:
        g = self.generate()
        self.sigma, n = self.level()
        return LOSSES[self.options.get("gan_loss", "hinge")][1](self.logits(g + n, self.sigma)).mean(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": (2.5, 0.4), "gan_loss": "non-saturating", "r1": 30.0, "r1_noise": 0.2},
        {"levels": (0.8,), "gan_loss": "log", "same_noise": True, "P_mean": -0.5, "P_std": 1.5},
        {"heads": "bottleneck", "r1": 3.0, "r1_noise": 0.2, "same_noise": True},
    ],
    ids=str,
)
def test_losses_and_gradients_are_the_equations(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange, options: dict[str, Any]
) -> None:
    networks, batch = tiny_networks(LADD, **options), tiny_batch(8)
    of_heads, of_generator = LADD(LADDConfig(**options), networks, noise).turns()
    with torch.no_grad():  # so that the hinge of some logits is at rest
        for parameter in networks["discriminator"].parameters():
            parameter.mul_(3)
    for role, turn in (("discriminator", of_heads), ("generator", of_generator)):
        found = turn.whole(batch, Draws(3, 8))
        naive = Naive(networks, batch, Draws(3, 8), options)
        expected = getattr(naive, role)()
        torch.testing.assert_close(found.value, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found.t, sigma_to_time(naive.sigma, SD))
        slopes = [
            torch.autograd.grad(loss.mean(), list(networks[role].parameters())) for loss in (found.value, expected)
        ]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        assert any(slope.abs().max() > 1e-4 for slope in slopes[1])


def test_the_discriminators_turn_trains_heads_alone(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    networks = tiny_networks(LADD)
    method = LADD(LADDConfig(r1=1.0, discriminator_turns=2), networks, noise)
    first, second, last = method.turns()
    assert (first, second, last.role) == (second, first, "generator")
    loss = first.whole(tiny_batch(8), Draws(0, 8))
    assert set(loss.signals) == {"logits_real", "logits_fake", "gan_accuracy", "r1"}
    loss.value.sum().backward()
    for role in ("teacher", "generator"):
        assert all(parameter.grad is None for parameter in networks[role].parameters())


def test_the_penalty_is_a_slope(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """(d(x) - d(x + r n))^2 grows as r^2, and on average is r^2 times R1's |dd/dx|^2."""
    networks, batch = tiny_networks(LADD, heads="bottleneck"), tiny_batch(1)
    rows = 20_000
    same = Batch(batch.x0.expand(rows, -1, -1, -1), batch.labels.expand(rows, -1))
    narrow = {"P_mean": 0.0, "P_std": 1e-9, "heads": "bottleneck"}
    means = [
        float(
            LADD(LADDConfig(r1=1.0, r1_noise=r, **narrow), networks, noise)
            .discriminator_loss(same, Draws(0, rows))
            .signals["r1"]
        )
        for r in (1e-4, 2e-4)
    ]
    assert means[1] == pytest.approx(4 * means[0], rel=1e-3)
    x0 = same.x0.clone().requires_grad_()
    draws = Draws(0, rows)
    draws.uniform(), draws.normal_like(x0), draws.normal(), draws.normal_like(x0), draws.normal()
    t = sigma_to_time(torch.ones(rows, dtype=torch.float64), SD)
    cos, sin = cos_sin(t, x0)
    x_s = cos * x0 + sin * draws.normal_like(x0, SD)
    logits = networks["discriminator"](networks["teacher"](x_s, t, same.labels, features=True))
    (slope,) = torch.autograd.grad(logits.sum(), x0)
    assert means[0] == pytest.approx(1e-8 * float(slope.square().sum((1, 2, 3)).mean()), rel=0.03)


def test_levels_must_decrease() -> None:
    with pytest.raises(ValueError, match="must decrease"):
        LADDConfig(levels=(0.4, 2.5))
