"""DMD2 and f-distill against their official code's equations, written naively in EDM's notation, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.divergence import WEIGHTS, density_ratio, divergence_weights
from edmdistill.methods.dmd2 import DMD2, DMD2Config
from edmdistill.trigflow import cos_sin, sigma_to_time

Make = Callable[..., Any]
SD = 0.5
LEVELS = (2.5, 0.4)


def denoiser(network: Any, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """D(x; sigma) of data x = x0 + sigma n."""
    t = sigma_to_time(sigma, SD)
    cos, sin = cos_sin(t, x)
    return cos * (cos * x) - sin * SD * network(cos * x, t, labels)


def logits(network: Any, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    t = sigma_to_time(sigma, SD)
    return network(cos_sin(t, x)[0] * x, t, labels, logits="alone")


def curve(r: Tensor, low: float = 0.002, high: float = 80.0) -> Tensor:
    return (low ** (1 / 7) + r * (high ** (1 / 7) - low ** (1 / 7))) ** 7


class Naive:
    """The official code's losses, from the same random numbers in the same order; but the fake score's images are of
    all steps, where there are several."""

    def __init__(
        self, networks: dict[str, nn.Module], batch: Batch, draws: Draws, levels: tuple[float, ...], simulated: bool
    ) -> None:
        self.networks, self.batch, self.draws, self.levels = networks, batch, draws, levels
        self.simulated = simulated

    def noise(self) -> Tensor:
        return self.draws.normal_like(self.batch.x0)

    def generate_from_data(self) -> Tensor:
        """Without --backward_simulation: indices row by row, noisy data, and pure noise at the top."""
        indices = (self.draws.uniform() * (len(self.levels) + 1)).long().tolist()
        sigma = torch.tensor([(80.0, *self.levels)[index] for index in indices], dtype=torch.float64)
        noise = sigma.reshape(-1, 1, 1, 1) * self.noise()
        x = torch.stack([n if index == 0 else n + x for n, x, index in zip(noise, self.batch.x0, indices, strict=True)])
        return denoiser(self.networks["generator"], x, sigma, self.batch.labels)

    def generate(self) -> Tensor:
        if not self.simulated:
            return self.generate_from_data()
        G, labels, size = self.networks["generator"], self.batch.labels, len(self.batch.x0)
        x, sigma = 80.0 * self.noise(), 80.0
        step = int(self.draws.common() * (len(self.levels) + 1))
        for after in self.levels[:step]:
            image = denoiser(G, x, torch.full((size,), sigma, dtype=torch.float64), labels).detach()
            x, sigma = image + after * self.noise(), after
        return denoiser(G, x, torch.full((size,), sigma, dtype=torch.float64), labels)

    def generate_every_step(self) -> Tensor:
        if not self.simulated:
            return self.generate_from_data()
        if not self.levels:
            return denoiser(self.networks["generator"], 80.0 * self.noise(), torch.full((8,), 80.0), self.batch.labels)
        steps = 1 + (self.draws.uniform() * (len(self.levels) + 1)).long()
        image = torch.zeros_like(self.batch.x0)
        for step, sigma in enumerate((80.0, *self.levels), 1):
            x = image + sigma * self.noise()
            new = denoiser(
                self.networks["generator"], x, torch.full_like(steps, sigma, dtype=torch.float64), self.batch.labels
            )
            for row in (steps >= step).nonzero().flatten():  # the others are done
                image[row] = new[row].detach()
        return image

    def noisy(self, image: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        sigma = curve(low + (high - low) * self.draws.uniform())
        return image + sigma.reshape(-1, 1, 1, 1) * self.noise(), sigma

    def fake(self, gan: float) -> Tensor:
        psi, labels = self.networks["auxiliary"], self.batch.labels
        sigma = curve(self.draws.uniform())
        image = self.generate_every_step().detach()
        x = image + sigma.reshape(-1, 1, 1, 1) * self.noise()
        weight = (sigma**-2 + SD**-2).reshape(-1, 1, 1, 1)
        loss = (weight * (denoiser(psi, x, sigma, labels) - image).square()).mean()
        if not gan:
            return loss
        fake = logits(psi, x, sigma, labels)
        real = logits(psi, *self.noisy(self.batch.x0, 0, 1), labels)
        return loss + gan * ((1 + fake.exp()).log() + (1 + (-real).exp()).log()).mean()

    def generator(self, gan: float, h: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        psi, labels = self.networks["auxiliary"], self.batch.labels
        image = self.generate()
        x, sigma = self.noisy(image, 0.02, 0.98)
        with torch.no_grad():
            p_real = image - denoiser(self.networks["teacher"], x, sigma, labels)
            p_fake = image - denoiser(psi, x, sigma, labels)
            grad = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
            if gan:
                grad = grad * h(logits(psi, x, sigma, labels), sigma).reshape(-1, 1, 1, 1)
        loss = 0.5 * (image - (image - grad).detach()).square().mean()
        return loss + gan * (1 + (-logits(psi, x, sigma, labels)).exp()).log().mean() if gan else loss


def naive_h(weight: Callable[[Tensor], Tensor], sigma: Tensor, fake_logits: Tensor) -> Tensor:
    r = [min(max(float(logit.mean().exp()), 0.1), 20.0) for logit in fake_logits]
    bins = [min(int((float(s) - 0.002) / ((80 - 0.002) / 10)), 9) for s in sigma]
    for bin in range(10):
        rows = [row for row in range(len(r)) if bins[row] == bin]
        mean = sum(r[row] for row in rows) / max(len(rows), 1)
        for row in rows:
            r[row] /= mean
    h = weight(torch.tensor(r, dtype=torch.float64))
    return h / h.mean()


@pytest.mark.parametrize(
    ("levels", "simulated"), [((), True), (LEVELS, True), (LEVELS, False)], ids=["one step", "three steps", "from data"]
)
@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon", "no gan"])
def test_the_losses_are_the_official_codes(
    divergence: str,
    levels: tuple[float, ...],
    simulated: bool,
    tiny_networks: Make,
    tiny_batch: Make,
    noise: NoiseRange,
) -> None:
    gan = divergence != "no gan"
    options: dict[str, Any] = {"levels": levels, "backward_simulation": simulated}
    options |= {"f_divergence": divergence} if gan else {"gan": 0.0}
    networks = tiny_networks(DMD2, **options)
    method, batch = DMD2(DMD2Config(**options), networks, noise), tiny_batch(8)
    auxiliary, generator = method.turns()[0], method.turns()[-1]
    assert [turn.role for turn in method.turns()] == ["auxiliary"] * 5 + ["generator"]
    weight = {"jensen-shannon": lambda r: r / (1 + r)}.get(divergence, torch.ones_like)
    for seed in range(4):  # three steps are drawn in three of these seeds
        naive = Naive(networks, batch, Draws(seed, 8), levels, simulated)
        preview = generator.preview and generator.preview(batch, Draws(seed, 8))
        more = () if preview is None else (preview,)
        found = auxiliary.loss(batch, Draws(seed, 8)).value.mean()
        compare(networks["auxiliary"], found, naive.fake(1e-2 if gan else 0.0))
        naive.draws = Draws(seed, 8)
        expected = naive.generator(3e-3 if gan else 0.0, lambda fake, sigma: naive_h(weight, sigma, fake))
        compare(networks["generator"], generator.loss(batch, Draws(seed, 8), *more).value.mean(), expected)


def compare(network: nn.Module, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(loss, list(network.parameters()), allow_unused=True) for loss in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def constant(x: Tensor, t: Tensor, labels: None, logits: str = "none") -> Any:
    """An auxiliary score of 0, with a logit of -3 beside the score and of 2 alone."""
    judged = x.new_full((len(x), 1), 2.0 if logits == "alone" else -3.0)
    return (0 * x, judged) if logits == "also" else judged if logits == "alone" else 0 * x


def black(x: Tensor, t: Tensor, labels: None) -> Tensor:
    """The F of images that are 0."""
    cos, sin = cos_sin(t, x)
    return cos * x / (sin * SD)


def test_signals_by_hand(noise: NoiseRange) -> None:
    networks = {"teacher": lambda x, *_: 0 * x + 3, "generator": black, "auxiliary": constant}
    method, batch = DMD2(DMD2Config(), networks, noise), Batch(torch.ones(4, 1, 2, 2, dtype=torch.float64), None)
    assert method.auxiliary_loss(batch, Draws(0, 4)).signals == {"logits_real": 2, "logits_fake": -3, "gan_accuracy": 1}
    assert float(method.generator_loss(batch, Draws(0, 4)).signals["score_gap"]) == pytest.approx(3 * SD)


def test_the_gradient_is_bounded_where_the_teacher_is_right(noise: NoiseRange) -> None:
    """At D* = g the scale is 1e-6, and a score of 0 leaves the velocity over it."""
    seen: list[Tensor] = []

    def right(x: Tensor, t: Tensor, labels: None) -> Tensor:
        cos, sin = cos_sin(t, x)
        seen.append(cos * x / sin)  # the velocity of black images
        return seen[0] / SD

    networks = {"teacher": right, "generator": black, "auxiliary": lambda x, *_: 0 * x}
    batch = Batch(torch.ones(4, 1, 2, 2, dtype=torch.float64), None)
    loss = DMD2(DMD2Config(gan=0.0), networks, noise).generator_loss(batch, Draws(0, 4))
    expected = 0.5 * (seen[0] / 1e-6).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-6)


def test_micro_batches_share_the_weights_of_the_whole_batch(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """As the loop sums previews: each mean with the weight of its rows."""
    options = {"f_divergence": "forward-kl", "levels": LEVELS}
    turn = DMD2(DMD2Config(**options), tiny_networks(DMD2, **options), noise).turns()[-1]
    batch = tiny_batch(8)
    parts = [slice(0, 3), slice(3, 8)]
    pieces = [Batch(batch.x0[rows], batch.labels[rows]) for rows in parts]
    previews = [turn.preview(piece, Draws(1, 8, rows)) for piece, rows in zip(pieces, parts, strict=True)]
    means = {
        name: sum(p.means[name] * len(b.x0) / 8 for p, b in zip(previews, pieces, strict=True))
        for name in ("r", "sigma")
    }
    whole = turn.preview(batch, Draws(1, 8))
    torch.testing.assert_close(means, whole.means, rtol=1e-12, atol=0)
    split = [
        turn.loss(piece, Draws(1, 8, rows), preview._replace(means=means)).value
        for piece, rows, preview in zip(pieces, parts, previews, strict=True)
    ]
    torch.testing.assert_close(torch.cat(split), turn.loss(batch, Draws(1, 8), whole).value, rtol=1e-10, atol=1e-14)


def test_weights_by_hand() -> None:
    """In one bin of ten, ratios 1 and 3 are normalized to 1/2 and 3/2; the others are alone in theirs."""
    r = torch.tensor([1.0, 3.0, 7.0, 5.0, 9.0, 2.0], dtype=torch.float64)
    sigma = 50 + torch.tensor([0.1, 0.2, 47.0, 49.0, 71.9, 80.0])  # in bins 0, 0, 5, 6, 8 and 9
    for name, expected in {
        "reverse-kl": [1, 1, 1],
        "forward-kl": [0.5, 1.5, 1],
        "jensen-shannon": [1 / 3, 3 / 5, 1 / 2],
        "softened-reverse-kl": [2 / 3, 2 / 5, 1 / 2],
        "squared-hellinger": [0.5**0.5, 1.5**0.5, 1],
        "jeffreys": [1.5, 2.5, 2],
        "neyman": [2, 2 / 3, 1],
    }.items():
        h = torch.tensor([*expected, *expected[2:] * 3], dtype=torch.float64)
        found = divergence_weights(name, r, sigma, 50.0, 130.0)
        torch.testing.assert_close(found, h / h.mean(), rtol=1e-12, atol=0)
    assert set(WEIGHTS) == {"reverse-kl", "forward-kl", "jensen-shannon"} | set(list(WEIGHTS)[3:])
    ratios = density_ratio(torch.tensor([[0.0, 0.0], [1.0, -0.5], [9.0, 9.0], [-9.0, -9.0]]))
    assert ratios.tolist() == pytest.approx([1, math.exp(0.25), 20, 0.1])


def test_options_that_contradict() -> None:
    with pytest.raises(ValueError, match="must decrease"):
        DMD2Config(levels=(0.4, 2.5))
    for option in ({"f_divergence": "forward-kl"}, {"gan_auxiliary": 1.0}):
        with pytest.raises(ValueError, match="set gan above 0"):
            DMD2Config(gan=0.0, **option)
    with pytest.raises(ValueError, match="set levels"):
        DMD2Config(backward_simulation=False)
    for gan, head in ((0.0, None), (3e-3, "bottleneck")):
        assert DMD2.roles_for(DMD2Config(gan=gan))["auxiliary"].head == head
