"""The adversarial losses against their formulas; the relativistic one is in test_adversarial.py."""

import math

import pytest
import torch

from edmdistill.methods.gan_losses import GAN_LOSSES, gan_signals


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

    assert GAN_LOSSES["non-saturating"].discriminator is GAN_LOSSES["log"].discriminator
    expected = -(math.log(d[2]) + math.log(d[3])) / 2
    assert float(GAN_LOSSES["non-saturating"].generator(fake)) == pytest.approx(expected, rel=1e-6)


def test_the_accuracy_by_hand() -> None:
    """By the mean logit of an image, or the order of a pair; a discriminator that says nothing is at chance."""
    real, fake = torch.tensor([[2.0, -1.0], [1.0, -3.0], [4.0, 4.0], [-1.0, 0.0]]), torch.tensor([[3.0, 1.0]] * 4)
    fake[3] = -2.0
    assert float(gan_signals(real, fake)["gan_accuracy"]) == (2 + 1) / 8  # real 0 and 2, generated 3
    assert float(gan_signals(real, fake, relative=True)["gan_accuracy"]) == 2 / 4  # pairs 2 and 3
    for relative in (False, True):
        assert float(gan_signals(torch.zeros(3, 2), torch.zeros(3, 2), relative)["gan_accuracy"]) == 0.5
