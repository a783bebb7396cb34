"""Images of several steps, of a generator whose images say at which noise level they were made."""

from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.backward_simulation import of_every_step, of_noisy_data, of_one_step, require_descending
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.trigflow import cos_sin

LEVELS = (2.5, 0.4)
ROWS = 3000


class Telling:
    """A generator of images of one color, which is sigma times a weight."""

    def __init__(self, noise: NoiseRange) -> None:
        self.noise, self.weight = noise, torch.ones((), dtype=torch.float64, requires_grad=True)
        self.seen: list[tuple[float, float, bool]] = []

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, **_: Any) -> Tensor:
        cos, sin = cos_sin(t, x_t)
        sigma = self.noise.sigma_data * t.tan()
        self.seen.append((float(sigma[0]), float((x_t.detach() / cos).std()), torch.is_grad_enabled()))
        return (cos * x_t - self.weight * sigma[:, None, None, None]) / (sin * self.noise.sigma_data)


def batch() -> Batch:
    return Batch(torch.zeros(ROWS, 1, 2, 2, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.long))


def test_every_step_has_its_share_of_the_rows(noise: NoiseRange) -> None:
    g = of_every_step(Telling(noise), batch(), LEVELS, Draws(0, ROWS), noise)
    for sigma in (noise.sigma_max, *LEVELS):
        share = torch.isclose(g, torch.full_like(g, sigma), rtol=1e-6).double().mean()
        assert abs(share - 1 / 3) < 0.03


def test_one_step_is_the_same_for_all_rows_and_alone_has_a_gradient(noise: NoiseRange) -> None:
    found = set()
    for seed in range(12):
        generator = Telling(noise)
        g = of_one_step(generator, batch(), LEVELS, Draws(seed, ROWS), noise).detach()
        assert g.std() < 1e-6
        found.add(round(float(g.mean()), 3))
        gradients = [enabled for _, _, enabled in generator.seen]
        assert gradients == [False] * (len(gradients) - 1) + [True]
    assert found == {noise.sigma_max, *LEVELS}


def test_a_step_starts_from_the_image_before_with_noise_of_its_level(noise: NoiseRange) -> None:
    generator = Telling(noise)
    of_every_step(generator, batch(), LEVELS, Draws(0, ROWS), noise)
    levels, stds, _ = zip(*generator.seen, strict=True)
    torch.testing.assert_close(levels, (noise.sigma_max, *LEVELS), rtol=1e-6, atol=0)
    # Images are of one color, so what varies is noise; but before the third step a third is of the first color.
    torch.testing.assert_close(stds[:2], (noise.sigma_max, LEVELS[0]), rtol=0.03, atol=0)
    assert stds[2] > 10 * LEVELS[1]


def test_later_steps_can_start_from_data(noise: NoiseRange) -> None:
    """The generator sees x_t of data of one value, of which the first step's is to have none."""
    seen = []

    class Seeing(Telling):
        def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, **more: Any) -> Tensor:
            seen.append((x_t, t))
            return super().__call__(x_t, t, labels, **more)

    data = Batch(torch.full((ROWS, 1, 2, 2), 300.0, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.long))
    g = of_noisy_data(Seeing(noise), data, LEVELS, Draws(0, ROWS), noise)
    ((x_t, t),) = seen
    sigma = noise.sigma_data * t.tan()
    for level, mean in ((noise.sigma_max, 0.0), (LEVELS[0], 300.0), (LEVELS[1], 300.0)):
        rows = torch.isclose(sigma, torch.full_like(sigma, level))
        assert abs(rows.double().mean() - 1 / 3) < 0.03
        x = (x_t / t.cos()[:, None, None, None])[rows]
        assert abs(x.mean() - mean) < 5 * level / (x.numel() ** 0.5)
        torch.testing.assert_close(float(x.std()), level, rtol=0.05, atol=0)
        assert g[rows].requires_grad


def test_levels_that_do_not_decrease_are_refused() -> None:
    require_descending((2.5, 0.4))
    for levels in ((0.4, 2.5), (2.5, 2.5)):
        with pytest.raises(ValueError, match="must decrease: each step starts below the one before"):
            require_descending(levels)
