"""GAN losses, augmentations and distances."""

import math

import pytest
import torch

from edmdistill.draws import Draws
from edmdistill.methods.adversarial import AUGMENTATIONS, GAN_LOSSES, augment
from edmdistill.methods.distances import DISTANCES


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert GAN_LOSSES["hinge"].discriminator(real, fake) == pytest.approx((0 + 1) / 2 + (0 + 2) / 2)
    assert GAN_LOSSES["hinge"].generator(fake) == pytest.approx(1.0)
    d = [1 / (1 + math.exp(-x)) for x in (2.0, 0.0, -3.0, 1.0)]
    expected = -(math.log(d[0]) + math.log(d[1])) / 2 - (math.log(1 - d[2]) + math.log(1 - d[3])) / 2
    assert float(GAN_LOSSES["log"].discriminator(real, fake)) == pytest.approx(expected, rel=1e-6)
    assert float(GAN_LOSSES["log"].generator(fake)) == pytest.approx(
        (math.log(1 - d[2]) + math.log(1 - d[3])) / 2, rel=1e-6
    )


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
    shifts = set()
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            shifted = torch.zeros(16, 16)
            rows, columns = slice(max(0, -dy), 16 - max(0, dy)), slice(max(0, -dx), 16 - max(0, dx))
            shifted[rows, columns] = x[0, 0].roll((-dy, -dx), (0, 1))[rows, columns]
            if (moved == shifted).all((1, 2, 3)).any():
                shifts.add((dy, dx))
    assert len(shifts) == 25
    covered = (augment(x, Draws(0, 500), ["cutout"]) == 0).flatten(1).sum(1)
    assert covered.max() == 64
    assert covered.min() == 16


def test_distances_mean_the_same_at_any_size() -> None:
    a, b = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.25)
    wide = [x.repeat(1, 1, 4, 4) for x in (a, b)]
    for distance in DISTANCES.values():
        torch.testing.assert_close(distance(a, b), distance(*wide))
        assert (distance(a, a) == 0).all()
    torch.testing.assert_close(DISTANCES["l2"](a, b), torch.full((2,), 0.0625))
    torch.testing.assert_close(DISTANCES["pseudo-huber"](a, b), torch.full((2,), 0.25), rtol=0, atol=6e-4)
