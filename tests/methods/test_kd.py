"""KD: its target is the sampler's image, its minimum the solver's own map, at every level that is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, over
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.kd import KD, KDConfig
from edmdistill.methods.solver import multistep_trajectory
from edmdistill.sampling.dpm_solver import dpm_solver_pp_2m
from edmdistill.schedules import curve_through
from edmdistill.trigflow import cos_sin, denoised, sigma_to_time

Make = Callable[..., Any]
NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
ROWS, MEAN, WIDE = 12, 0.2, 0.45
LEVELS = (10.0, 0.6)


def slope(t: Tensor, std: float) -> Tensor:
    """F / x of the diffusion of N(0, std^2)."""
    cos, sin = t.cos(), t.sin()
    return cos * sin * (SIGMA_DATA**2 - std**2) / (cos**2 * std**2 + sin**2 * SIGMA_DATA**2) / SIGMA_DATA


def teacher(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """F of the diffusion of N(MEAN, STD^2); of N(0, WIDE^2) without a class."""
    if labels is None:
        return over(x, slope(t, WIDE)) * x
    cos, sin = cos_sin(t, x)
    return over(x, slope(t, STD)) * (x - cos * MEAN) - sin * MEAN / SIGMA_DATA


def batch(rows: int = ROWS) -> Batch:
    return Batch(torch.zeros(rows, 1, 2, 2, dtype=torch.float64), torch.ones(rows, 1, dtype=torch.float64))


def solved(config: KDConfig, x_T: Tensor, w: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """The trajectories' points and ends, by the solver on the grid of the options, and the grid's times."""
    sigmas, starts = curve_through(config.levels, config.trajectory_steps, 0.002, 80.0)
    times = sigma_to_time(sigmas, SIGMA_DATA)[:, None].expand(-1, len(x_T))
    labels = torch.ones(len(x_T), 1, dtype=torch.float64)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        guide = teacher(x, t)
        return teacher(x, t, labels) if w is None else guide + over(x, w) * (teacher(x, t, labels) - guide)

    points, end = multistep_trajectory(flow, x_T, times, SIGMA_DATA)
    return [points[k] for k in starts], end, times[list(starts)]


class Solution(nn.Module):
    """The generator that is the solver's map from each level, which is affine here, off by a learned number there."""

    def __init__(self, config: KDConfig, off: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
        super().__init__()
        self.config, self.off = config, nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, w: Tensor | None = None) -> Tensor:
        one = torch.ones(len(x), 1, 1, 1, dtype=torch.float64)
        (at_0, end_0, times), (at_1, end_1, _) = (solved(self.config, k * one, w) for k in (0, 1))
        g = torch.zeros_like(x)
        for level, (a, b, time) in enumerate(zip(at_0, at_1, times, strict=True)):
            image = end_0 + (end_1 - end_0) * (x - a) / (b - a) + self.off[level]
            g = torch.where(over(x, (t - time).abs() < 1e-12), image, g)
        cos, sin = cos_sin(t, x)
        return (cos * x - g) / (sin * SIGMA_DATA)


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("levels", [(), LEVELS])
def test_the_minimum_is_the_solvers_map(
    levels: tuple[float, ...], guidance: tuple[float, float], distance: Any
) -> None:
    """From every level, at the weight of each row; there loss and gradient are 0, and nowhere near it."""
    config = KDConfig(trajectory_steps=6, levels=levels, guidance=guidance, distance=distance)
    found = []
    for off in ((0.0, 0.0, 0.0), (0.1, 0.1, 0.1)):
        generator = Solution(config, off)
        loss = KD(config, {"teacher": teacher, "generator": generator}, NOISE).regression_loss(batch(), Draws(0, ROWS))
        loss.value.sum().backward()
        found.append((loss.value.detach(), generator.off.grad[: len(levels) + 1]))
    (value, slopes), (value_off, slopes_off) = found
    assert value.max() < 1e-20
    assert slopes.abs().max() < 1e-9
    if distance == "l2":
        torch.testing.assert_close(value_off, torch.full_like(value, 0.01))
    assert (slopes_off > 0.5 / len(slopes)).all()


def test_each_step_counts_equally_and_monitors_see_the_last() -> None:
    config = KDConfig(trajectory_steps=6, levels=LEVELS)
    images = []
    for level in range(3):
        off = tuple(0.3 * (step == level) for step in range(3))
        networks = {"teacher": teacher, "generator": Solution(config, off)}
        loss = KD(config, networks, NOISE).regression_loss(batch(), Draws(0, ROWS))
        torch.testing.assert_close(loss.value, torch.full_like(loss.value, 0.09 / 3))
        images.append(loss.generated)
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[2], images[0] + 0.3)


def test_the_target_is_the_image_of_sample() -> None:
    """By `--solver dpm-solver++2m`, from the noise that the generator gets."""

    class Denoiser:
        sigma_min, sigma_max = 0.002, 80.0

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return sigma

        def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            t = sigma_to_time(sigma, SIGMA_DATA).expand(len(x))
            x_t = x * cos_sin(t, x)[0]
            return denoised(x_t, teacher(x_t, t, labels), t, SIGMA_DATA)

    seen = []

    def nothing(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """F of the image that is 0 everywhere."""
        seen.append((x, t))
        cos, sin = cos_sin(t, x)
        return cos * x / (sin * SIGMA_DATA)

    config = KDConfig(trajectory_steps=7)
    loss = KD(config, {"teacher": teacher, "generator": nothing}, NOISE).regression_loss(batch(), Draws(0, ROWS))
    ((x_T, t),) = seen
    assert (SIGMA_DATA * t.tan()).tolist() == pytest.approx([80.0] * ROWS)
    levels = torch.cat([curve_through((), 7, 0.002, 80.0)[0], torch.zeros(1, dtype=torch.float64)])
    images = dpm_solver_pp_2m(Denoiser(), x_T / cos_sin(t, x_T)[0] / levels[0], batch().labels, sigmas=levels)
    torch.testing.assert_close(loss.value, images.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_of_data_only_labels_and_shape_are_read(tiny_networks: Make, tiny_batch: Make) -> None:
    method = KD(KDConfig(trajectory_steps=3, levels=LEVELS), tiny_networks(KD), NOISE)
    full = tiny_batch()
    empty = full._replace(x0=torch.full_like(full.x0, torch.nan))
    assert torch.equal(*(method.regression_loss(each, Draws(0, 6)).value for each in (full, empty)))


def test_a_trajectory_belongs_to_its_row(tiny_networks: Make, tiny_batch: Make) -> None:
    """In any micro-batch its loss is the same, and its image that of the last step."""
    guided: dict[str, Any] = {"guidance": (1.0, 3.0), "guide": "network"}
    method = KD(KDConfig(trajectory_steps=4, levels=LEVELS, **guided), tiny_networks(KD, **guided), NOISE)
    full = tiny_batch()

    def loss(rows: slice) -> tuple[Tensor, Tensor]:
        part = Batch(full.x0[rows], full.labels[rows])
        _loss = method.regression_loss(part, Draws(0, 6, rows))
        return _loss.value, _loss.generated

    parts = [torch.cat(part) for part in zip(loss(slice(0, 2)), loss(slice(2, 6)), strict=True)]
    for part, whole in zip(parts, loss(slice(0, 6)), strict=True):
        torch.testing.assert_close(part, whole)
        assert len(whole) == 6


def test_a_trajectory_costs_its_steps_and_the_generator_one_pass() -> None:
    calls = []

    def counted(name: str) -> Callable[..., Tensor]:
        def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            calls.append((name, len(x)))
            return teacher(x, t, labels)

        return network

    networks = {name: counted(name) for name in ("teacher", "generator")}
    KD(KDConfig(trajectory_steps=5, levels=LEVELS), networks, NOISE).regression_loss(batch(), Draws(0, ROWS))
    assert calls == [("teacher", ROWS)] * 5 + [("generator", 3 * ROWS)]


def test_more_steps_than_the_trajectory_has_are_refused() -> None:
    KDConfig(trajectory_steps=3, levels=LEVELS)
    with pytest.raises(ValueError, match=r"less than the 3 steps of the generator.*: set it to 3 at least"):
        KDConfig(trajectory_steps=2, levels=LEVELS)
    with pytest.raises(ValueError, match="must decrease"):
        KDConfig(levels=(0.6, 10.0))
    with pytest.raises(ValueError, match="lpips = FILE go together"):
        KDConfig(distance="lpips")
