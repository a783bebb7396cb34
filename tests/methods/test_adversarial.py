"""Adversarial turns, augmentations and distances."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edmdistill.draws import Draws
from edmdistill.methods import METHODS
from edmdistill.methods.adversarial import Adversary, GANConfig
from edmdistill.methods.base import NoiseRange
from edmdistill.methods.diff_augment import AUGMENTATIONS, augment
from edmdistill.methods.distances import DISTANCES

Make = Callable[..., Any]


def critic(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two logits of each image, of a slope that differs from image to image."""
    return (images.flatten(1) @ weight).square() + images.flatten(1) @ weight.flip(1)


def test_the_relativistic_loss_pairs_images_and_penalizes_both_slopes() -> None:
    """Equal, with its gradients, to R3GAN's losses written per image, in float64."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    weight = torch.randn(12, 2, dtype=torch.float64, requires_grad=True) / 3
    networks = {"features": torch.nn.Identity(), "discriminator": lambda maps: critic(maps, weight)}
    for gamma in (None, 0.0, 0.3):
        config = GANConfig(gan=1.0, gan_loss="relativistic", gan_penalty=gamma, gan_augment=())
        adversary, expected, generator = Adversary(networks, config), [], []
        for x, g in zip(real, fake, strict=True):
            x, g = x[None].requires_grad_(), g[None].requires_grad_()
            D_x, D_g = critic(x, weight).mean(), critic(g, weight).mean()
            (R1,), (R2,) = (torch.autograd.grad(D, of, create_graph=True) for D, of in ((D_x, x), (D_g, g)))
            pair = (1 + (D_g - D_x).exp()).log()
            expected.append(pair + (1.0 if gamma is None else gamma) / 2 * (R1.square().sum() + R2.square().sum()))
            generator.append((1 + (D_x - D_g).exp()).log())
        found, signals = adversary.discriminator_loss(real, fake, Draws(0, 5))
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
        slopes = [torch.autograd.grad(torch.stack(list(loss)).mean(), weight)[0] for loss in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
        assert ("gan_slopes" in signals) == (gamma != 0)
        attached = fake.clone().requires_grad_()
        judged = adversary.generator_loss(real, attached, Draws(0, 5))
        torch.testing.assert_close(judged, torch.stack(generator), rtol=1e-12, atol=1e-12)
        assert torch.autograd.grad(judged[1], attached)[0].flatten(1).abs().sum(1).nonzero().tolist() == [[1]]
    assert not real.requires_grad  # the caller's images are left as they were


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_both_turns_judge_augmented_images(loss: str) -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    seen, augmentations = [], ("color", "translation", "cutout")
    networks = {"features": lambda x: seen.append(x) or x, "discriminator": lambda maps: maps.flatten(1)}
    adversary = Adversary(networks, GANConfig(gan=1.0, gan_loss=loss))
    adversary.discriminator_loss(real, fake, Draws(0, 5))
    adversary.generator_loss(real, fake, Draws(0, 5))
    for images, found in zip([[real, fake], [fake, real][: 1 + adversary.loss.relative]], seen, strict=True):
        draws = Draws(0, 5)
        expected = torch.cat([augment(image, draws, augmentations) for image in images])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["scd", "cosim", "fmd"])
def test_the_adversarial_term_is_balanced_in_the_last_layer(
    name: str, tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """A fine-tune's gradient there is g + gan |g| / (|g'| + 1e-4) g', g' the adversarial one; g alone in the warmup."""
    kind, options = METHODS[name].load(), {"gan": 0.25, "gan_loss": "relativistic", "gan_warmup_images": 8}
    networks, alone = tiny_networks(kind, **options), tiny_networks(kind)
    turn = kind(kind.Config(**options), networks, noise).turns()[-1]
    plain = kind(kind.Config(), alone, noise).turns()[-1]
    last, batch = networks["generator"].out.weight, tiny_batch()
    (g,) = torch.autograd.grad(plain.loss(batch, Draws(0, 6)).value.mean(), alone["generator"].out.weight)
    warmup = turn.loss(batch, Draws(0, 6), turn.preview(batch, Draws(0, 6)))
    (warmup,) = torch.autograd.grad(warmup.value.mean(), last)
    torch.testing.assert_close(warmup, g, rtol=1e-10, atol=1e-12)
    batch = batch._replace(images=8)
    loss = turn.loss(batch, Draws(0, 6), turn.preview(batch, Draws(0, 6)))
    (adversarial,) = torch.autograd.grad(turn.loss.__self__.terms(batch, Draws(0, 6)).losses["gan"].mean(), last)
    weight = 0.25 * float((g.norm() / (adversarial.norm() + 1e-4)).clamp(0.01, 10))
    assert float(loss.signals["lambda_gan"]) == pytest.approx(weight)
    (found,) = torch.autograd.grad(loss.value.mean(), last)
    torch.testing.assert_close(found, g + weight * adversarial, rtol=1e-9, atol=1e-12)
    assert not loss.generated.requires_grad


@pytest.mark.parametrize("name", ["sct", "scd", "dscd", "mean-flow", "fmd"])
def test_what_is_judged_is_made_of_noise_alone(
    name: str, tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """In one step from sigma_max to the data, in both turns; not what the method's own loss makes of noisy data.

    At the weight of each sample, where the teacher is guided.
    """
    guided = {"guidance": (1.0, 3.0), "guide": "network"} if name in ("scd", "dscd", "fmd") else {}
    kind, options, calls = METHODS[name].load(), {"gan": 1.0, "balance": "fixed"} | guided, []
    networks = tiny_networks(kind, **options)
    networks["generator"].register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    for turn in kind(kind.Config(**options), networks, noise).turns():
        calls.clear()
        turn.whole(tiny_batch(200), Draws(0, 200))
        (x_t, t, *_), more = calls[-1]
        assert t.tan().mul(noise.sigma_data).tolist() == pytest.approx([noise.sigma_max] * 200)
        assert (more.get("second", torch.zeros(1)) == 0).all()
        assert float(x_t.std()) == pytest.approx(noise.sigma_data, rel=0.1)


def test_a_discriminator_judges_single_steps() -> None:
    with pytest.raises(ValueError, match="intervals = 2 needs as many steps"):
        METHODS["scd"].load().Config(gan=1.0, intervals=2)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_image_is_augmented_by_its_own_draws(augmentation: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    out = augment(x, Draws(0, 200), [augmentation])
    alone = augment(x[64:80], Draws(0, 200, slice(64, 80)), [augmentation])
    torch.testing.assert_close(out[64:80], alone)
    (slope,) = torch.autograd.grad(out[3].sum(), x)
    assert (slope[3] != 0).any()
    assert (slope[:3] == 0).all()
    assert ((out - x).flatten(1).abs().max(1).values > 1e-3).double().mean() > 0.5
    assert augment(x, Draws(0, 200), []) is x


def test_translation_moves_and_cutout_covers() -> None:
    x = torch.arange(1.0, 257.0).reshape(1, 1, 16, 16).expand(500, 1, 16, 16)
    moved = augment(x, Draws(0, 500), ["translation"])
    shares = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            shifted = torch.zeros(16, 16)
            rows, columns = slice(max(0, -dy), 16 - max(0, dy)), slice(max(0, -dx), 16 - max(0, dx))
            shifted[rows, columns] = x[0, 0].roll((-dy, -dx), (0, 1))[rows, columns]
            shares.append((moved == shifted).all((1, 2, 3)).double().mean())
    assert sum(shares) == pytest.approx(1)  # no other
    assert min(shares) > 0.02
    covered = (augment(x, Draws(0, 500), ["cutout"]) == 0).flatten(1).sum(1)
    assert covered.max() == 64
    assert covered.min() == 16


def test_color_is_a_shift_of_the_mean_and_two_factors() -> None:
    """Each uniform in its range: of all, of what differs between channels, and of what differs from the mean."""
    rows, rng = 4000, torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 4, 4, generator=rng, dtype=torch.float64)
    y = augment(x, Draws(0, rows), ["color"])

    def parts(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, gray = image.mean((1, 2, 3), keepdim=True), image.mean(1, keepdim=True)
        return mean, gray - mean, image - gray

    (mean, gray, chroma), (mean_y, gray_y, chroma_y) = parts(x), parts(y)
    brightness = (mean_y - mean)[:, 0, 0, 0]
    contrast, both = (gray_y / gray).flatten(1), (chroma_y / chroma).flatten(1)
    for factor in (contrast, both):
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=0)
    contrast, saturation = contrast[:, 0], both[:, 0] / contrast[:, 0]
    for value, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        quarters = torch.histc(value, 4, low, high) / rows
        torch.testing.assert_close(quarters, torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("size", [16, 10])
def test_every_center_of_a_cutout_is_as_likely(size: int) -> None:
    """Half the size is even or odd; a side of n covers 1 ... n rows at either end as often."""
    covered = (augment(torch.ones(20_000, 1, size, size), Draws(0, 20_000), ["cutout"]) == 0)[:, 0].any(2)
    side, first = size // 2, covered.double().argmax(1)
    starts = first - (first == 0) * (side - covered.sum(1))
    places = torch.bincount(starts + side // 2)
    assert len(places) == size + 1 - side % 2
    assert (places / 20_000 * len(places) - 1).abs().max() < 0.15


def test_distances_mean_the_same_at_any_size() -> None:
    a, b = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.25)
    wide = [x.repeat(1, 1, 4, 4) for x in (a, b)]
    for distance in DISTANCES.values():
        torch.testing.assert_close(distance(a, b), distance(*wide))
        assert (distance(a, a) == 0).all()
    torch.testing.assert_close(DISTANCES["l2"](a, b), torch.full((2,), 0.0625))
    torch.testing.assert_close(DISTANCES["pseudo-huber"](a, b), torch.full((2,), 0.25), rtol=0, atol=6e-4)
