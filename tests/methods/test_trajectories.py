"""Trajectories against the sampler of the same order and a flow in closed form, and the regression on their points."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import cosim
from edmdistill.methods.base import Batch, Loss, NoiseRange
from edmdistill.methods.cosim import CoSIM
from edmdistill.methods.fmd import FMD
from edmdistill.methods.scm import ContinuousConsistency
from edmdistill.methods.solver import multistep_trajectory
from edmdistill.methods.trajectories import trajectory_loss
from edmdistill.sampling.dpm_solver import dpm_solver_pp_2m
from edmdistill.schedules import edm_curve
from edmdistill.trigflow import cos_sin, denoised, diffuse, sigma_to_time

SD, DIM = 0.5, 3
NOISE = NoiseRange(SD, 0.002, 80.0)
Make = Callable[..., Any]


def data() -> tuple[Tensor, Tensor]:
    """Mean and diagonal covariance of Gaussian data."""
    return torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.02, 0.3], dtype=torch.float64)


@pytest.fixture
def teacher(gaussian_flow: Make) -> Callable[..., Tensor]:
    mean, variance = data()
    return gaussian_flow(mean, variance.diag())


def at(x: Tensor, sigma: Tensor, to: Tensor | float) -> Tensor:
    """The trajectory's point at another noise level, in EDM's scale: it keeps its place in standard deviations."""
    mean, variance = (part.reshape(1, -1, 1, 1) for part in data())
    return mean + (x - mean) * ((variance + to**2) / (variance + sigma**2)).sqrt()


def curve(steps: int, r: Tensor) -> Tensor:
    return edm_curve((1 - torch.arange(steps, dtype=torch.float64)[:, None] / steps) * r, 0.002, 80.0)


def solved(teacher: Callable[..., Tensor], steps: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Noise levels [K,B] of rows that start at different ones, the start in EDM's scale, points and end."""
    r = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    x0 = torch.randn(2, 3, DIM, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = curve(steps, r)
    times = sigma_to_time(sigmas, SD)
    x_t = diffuse(0.3 * x0[0], SD * x0[1], times[0])
    points, end = multistep_trajectory(teacher, x_t, times, SD)
    return sigmas, x_t / cos_sin(times[0], x_t)[0], points, end


def test_a_trajectory_is_dpm_solvers(teacher: Callable[..., Tensor]) -> None:
    """Of each row, its end is that of the sampler at the row's levels."""

    class Denoiser:
        sigma_min, sigma_max = 0.002, 80.0

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return sigma

        def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            t = sigma_to_time(sigma, SD).expand(len(x))
            x_t = x * cos_sin(t, x)[0]
            return denoised(x_t, teacher(x_t, t), t, SD)

    sigmas, start, _, end = solved(teacher, 7)
    for row in range(3):
        levels = torch.cat([sigmas[:, row], sigmas.new_zeros(1)])
        expected = dpm_solver_pp_2m(Denoiser(), start[row : row + 1] / levels[0], sigmas=levels)
        torch.testing.assert_close(end[row : row + 1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_step_costs_one_evaluation(teacher: Callable[..., Tensor], steps: int) -> None:
    calls: list[Tensor] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return teacher(x, t)

    sigmas, _, points, _ = solved(counted, steps)
    assert len(points) == steps
    assert torch.equal(torch.stack(calls), sigma_to_time(sigmas, SD))


def test_points_and_end_converge_to_the_flow_at_second_order(teacher: Callable[..., Tensor]) -> None:
    errors = []
    for steps in (40, 80):
        sigmas, start, points, _ = solved(teacher, steps)
        half = sigmas[steps // 2].reshape(-1, 1, 1, 1)
        exact = at(start, sigmas[0].reshape(-1, 1, 1, 1), half)
        found = points[steps // 2]
        errors.append((found / cos_sin(sigma_to_time(sigmas[steps // 2], SD), found)[0] - exact).abs().max().item())
    assert 3.3 < errors[0] / errors[1] < 5, errors


def test_of_one_step_the_target_is_the_teacher(tiny_networks: Make, tiny_batch: Make) -> None:
    networks = tiny_networks(CoSIM)
    options = {"steps": 1, "share_to_max": 0.5}
    loss = trajectory_loss(networks["teacher"], networks["teacher"], tiny_batch(), Draws(0, 6), NOISE, **options)
    assert loss.value.max() < 1e-18


def test_the_gradient_is_of_the_generator_alone(tiny_networks: Make, tiny_batch: Make) -> None:
    """Though a trajectory goes through the teacher many times."""
    networks = tiny_networks(CoSIM)
    options = {"steps": 3, "share_to_max": 0.5}
    loss = trajectory_loss(networks["generator"], networks["teacher"], tiny_batch(), Draws(0, 6), NOISE, **options)
    loss.value.sum().backward()
    assert all(parameter.grad is not None for parameter in networks["generator"].parameters())
    assert all(parameter.grad is None for parameter in networks["teacher"].parameters())


def test_the_error_is_a_sum_over_an_image_and_its_signal_a_mean(tiny_networks: Make, tiny_batch: Make) -> None:
    """For a generator that is off by 0.3; a trajectory counts at the noise level where it starts."""
    teacher, asked = tiny_networks(CoSIM)["teacher"], []

    def off(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        asked.append(t)
        return teacher(x, t, labels) + 0.3

    for steps in (1, 2):
        loss = trajectory_loss(off, teacher, tiny_batch(), Draws(0, 6), NOISE, steps=steps, share_to_max=0.5)
        assert torch.equal(loss.t, asked[-1][:6])
        if steps == 1:
            torch.testing.assert_close(loss.value, torch.full_like(loss.value, 0.09 * 12))
            torch.testing.assert_close(loss.signals["trajectory_error"], torch.tensor(0.09, dtype=torch.float64))


def test_the_loss_is_a_mean_over_the_points(tiny_networks: Make, tiny_batch: Make) -> None:
    """Of a generator that is so far off that the targets do not count."""
    teacher = tiny_networks(CoSIM)["teacher"]
    for steps in (1, 4):
        loss = trajectory_loss(
            lambda x, *_: 0 * x + 1e9, teacher, tiny_batch(), Draws(0, 6), NOISE, steps=steps, share_to_max=0.5
        )
        torch.testing.assert_close(loss.value, torch.full_like(loss.value, 12e18), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "warmup"), [(CoSIM, "warmup_images"), (FMD, "trajectory_images")])
def test_beside_a_loss_trajectories_add_their_value_and_signals(
    kind: Any, warmup: str, tiny_networks: Make, tiny_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone as long as the warm-up lasts."""
    value, t, images = torch.arange(1.0, 4), torch.tensor([0.1, 0.2, 0.3]), torch.ones(3, 1, 2, 2)
    main, regression = Loss(value, t, {"a": value[0]}, images), Loss(10 * value, t + 1, {"b": value[1]})
    both = Loss(6 * value, t, {"a": value[0], "b": value[1]}, images)
    monkeypatch.setattr(CoSIM, "gap_loss", lambda *_: main)
    monkeypatch.setattr(ContinuousConsistency, "generator_loss", lambda *_: main)
    monkeypatch.setattr(cosim, "trajectory_loss", lambda *_, **__: regression)
    monkeypatch.setattr(FMD, "trajectory_loss", lambda *_: regression)
    for warmup_images, expected in ((6, regression), (5, both)):
        options = {"trajectory_steps": 2, "trajectory_weight": 0.5, warmup: warmup_images}
        method = kind(kind.Config(**options), tiny_networks(kind, **options), NOISE)
        found = method.generator_loss(tiny_batch(3)._replace(images=5), Draws(0, 3))
        torch.testing.assert_close(tuple(found), tuple(expected))


@pytest.mark.parametrize(("kind", "warmup"), [(CoSIM, "warmup_images"), (FMD, "trajectory_images")])
@pytest.mark.parametrize(("gan_warmup", "begins"), [(0, 6), (9, 9)])
def test_trajectories_alone_have_no_adversary(
    kind: Any, warmup: str, gan_warmup: int, begins: int, tiny_networks: Make, tiny_batch: Make
) -> None:
    """Neither its turns nor its term come before the method's own loss, or gan_warmup_images."""
    options = {"trajectory_steps": 2, warmup: 6, "gan": 1.0, "gan_warmup_images": gan_warmup}
    turns = {turn.role: turn for turn in kind(kind.Config(**options), tiny_networks(kind, **options), NOISE).turns()}
    assert turns["discriminator"].begins == begins
    assert turns["generator"].begins == 0
    for images in (0, 5, 6, 8, 9):
        loss = turns["generator"].whole(tiny_batch()._replace(images=images), Draws(0, 6))
        assert ("lambda_gan" in loss.signals) == (images >= begins), images


@pytest.mark.parametrize("share", [None, 0.25])
def test_the_jumps_of_the_flow_are_the_minimum(teacher: Callable[..., Tensor], share: float | None) -> None:
    """The error of the flow's map is the solver's alone; that of the velocity is large."""

    def flow_map(x_t: Tensor, t: Tensor, labels: Tensor | None = None, s: Tensor | float = 0.0) -> Tensor:
        (cos, sin), s = cos_sin(t, x_t), s * torch.ones_like(t)
        (cos_s, sin_s), (cos_d, sin_d) = cos_sin(s, x_t), cos_sin(t - s, x_t)
        x_s = cos_s * at(x_t / cos, SD * sin / cos, SD * sin_s / cos_s)
        return (cos_d * x_t - x_s) / (sin_d * SD)

    def velocity(x_t: Tensor, t: Tensor, labels: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        return teacher(x_t, t)

    batch = Batch(torch.zeros(64, DIM, 1, 1, dtype=torch.float64), None)
    flow, single = (
        trajectory_loss(network, teacher, batch, Draws(1, 64), NOISE, steps=40, share_to_max=0.5, share_to_end=share)
        for network in (flow_map, velocity)
    )
    assert flow.value.mean() < 1e-3 * single.value.mean()


def test_a_share_of_jumps_leads_to_the_end_and_others_to_any_later_point(teacher: Callable[..., Tensor]) -> None:
    asked = []

    def asking(x_t: Tensor, t: Tensor, labels: Tensor | None, s: Tensor) -> Tensor:
        asked.append((t, s))
        return x_t

    rows, batch = 4_000, Batch(torch.zeros(4_000, DIM, 1, 1, dtype=torch.float64), None)
    trajectory_loss(asking, teacher, batch, Draws(0, rows), NOISE, steps=5, share_to_max=1.0, share_to_end=0.2)
    ((t, s),) = asked
    times = torch.cat([sigma_to_time(curve(5, torch.ones(1, dtype=torch.float64)), SD)[:, 0], torch.zeros(1)])
    start, stop = ((times[:, None] - time).abs().argmin(0) for time in (t, s))
    torch.testing.assert_close(times[stop], s, rtol=0, atol=1e-12)
    assert start.equal(torch.arange(5).repeat_interleave(rows))
    for k in range(5):
        counts = stop[start == k].bincount(minlength=6)
        assert not counts[: k + 1].any()
        expected = torch.full((5 - k,), 0.8 / (5 - k))
        expected[-1] += 0.2
        assert counts[k + 1 :].double() / rows == pytest.approx(expected, abs=0.04)


def test_a_trajectory_starts_on_the_circle(teacher: Callable[..., Tensor]) -> None:
    """From x0 = 1 and noise of standard deviation sigma_data, whatever its level."""
    rows, asked = 2000, []

    def asking(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append((x_t, t))
        return x_t

    batch = Batch(torch.ones(rows, DIM, 1, 1, dtype=torch.float64), None)
    trajectory_loss(asking, teacher, batch, Draws(0, rows), NOISE, steps=1, share_to_max=0.5)
    ((x_t, t),) = asked
    cos, sin = cos_sin(t, x_t)
    z = (x_t - cos) / sin
    assert float(z.std()) == pytest.approx(SD, rel=0.03)
    assert abs(float(z.mean())) < 0.02


def test_jumps_start_at_every_nth_point(teacher: Callable[..., Tensor]) -> None:
    """The first among them."""
    asked: list[tuple[Tensor, Tensor]] = []

    def asking(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append((x_t, t))
        return x_t

    rows, batch = 3, Batch(torch.zeros(3, DIM, 1, 1, dtype=torch.float64), None)
    for stride in (1, 3):
        trajectory_loss(asking, teacher, batch, Draws(0, rows), NOISE, steps=8, share_to_max=0.5, stride=stride)
    every, some = ([part.unflatten(0, (-1, rows)) for part in jumps] for jumps in asked)
    assert len(every[0]) == 8
    assert all(part.equal(whole[:6:3]) for whole, part in zip(every, some, strict=True))


@pytest.mark.parametrize(("method", "share"), [(CoSIM, None), (FMD, 0.25)])
def test_a_trajectory_belongs_to_its_row(method, share: float | None, tiny_networks: Make, tiny_batch: Make) -> None:
    """Its loss is the same in any micro-batch."""
    networks, batch = tiny_networks(method), tiny_batch()

    def loss(rows: slice) -> Tensor:
        part = Batch(batch.x0[rows], batch.labels[rows])
        draws = Draws(0, 6, rows)
        options: dict[str, Any] = {"steps": 4, "share_to_max": 0.5, "stride": 2, "share_to_end": share}
        return trajectory_loss(networks["generator"], networks["teacher"], part, draws, NOISE, **options).value

    torch.testing.assert_close(torch.cat([loss(slice(0, 2)), loss(slice(2, 6))]), loss(slice(0, 6)))


OPTIONS: dict[str, Any] = {"order": "t", "share_to_max": 0.0, "anchor_sigma": 2.0, "gradient": "kl"}


def test_cosims_other_jumps_then_start_above_the_anchor(tiny_networks: Make, tiny_batch: Make) -> None:
    networks, asked = tiny_networks(CoSIM), []
    generator = networks["generator"]

    def asking(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(t)
        return generator(x_t, t, labels)

    method = CoSIM(CoSIM.Config(**OPTIONS, trajectory_steps=4), {**networks, "generator": asking}, NOISE)
    for seed in range(20):
        method.generator_loss(tiny_batch(), Draws(seed, 6))
    points, starts = torch.cat(asked[::2]), torch.cat(asked[1::2])
    assert len(points) == 4 * len(starts)
    assert points.min() < math.atan(2.0 / SD) <= starts.min()


def assert_trajectories_begin(kind: Any, networks: dict[str, Any], batch: Batch, options: dict[str, Any]) -> None:
    """Before 100 images their loss is alone; then it is added to the method's, by its weight."""

    def loss(images: int, weight: float) -> Tensor:
        method = kind(kind.Config(**options, trajectory_weight=weight), networks, NOISE)
        loss = method.generator_loss(batch._replace(images=images), Draws(1, 6))
        assert (loss.signals.keys() == {"trajectory_error"}) == (images < 100)
        assert "trajectory_error" in loss.signals
        value: Tensor = loss.value
        return value

    regression, one, two = loss(99, 1.0), loss(100, 1.0), loss(100, 2.0)
    torch.testing.assert_close(two - one, regression)
    assert (one - regression).abs().min() > 1e-6


def test_until_the_warmup_ends_cosim_learns_trajectories_alone(tiny_networks: Make, tiny_batch: Make) -> None:
    networks, options = tiny_networks(CoSIM), OPTIONS | {"trajectory_steps": 4, "warmup_images": 100}
    assert_trajectories_begin(CoSIM, networks, tiny_batch(), options)
    turns = CoSIM(CoSIM.Config(**options), networks, NOISE).turns()
    assert [(turn.role, turn.begins) for turn in turns] == [("auxiliary", 100), ("generator", 0)]


def test_a_flow_map_learns_them_alone_and_then_beside_tangents(tiny_networks: Make, tiny_batch: Make) -> None:
    """Of a teacher that is guided at the weight of each row, which the generator reads at each point."""
    guided: dict[str, Any] = {"guidance": (1.0, 3.0), "guide": "network"}
    options = guided | {"trajectory_steps": 4, "trajectory_images": 100}
    assert_trajectories_begin(FMD, tiny_networks(FMD, **guided), tiny_batch(), options)


def test_a_flow_maps_trajectories_are_those_of_its_options(tiny_networks: Make, tiny_batch: Make) -> None:
    """The loss reaches the log variances too, without a gradient: processes wait for weights that it does not reach."""
    networks, batch = tiny_networks(FMD), tiny_batch(40)
    method = FMD(FMD.Config(trajectory_steps=3, share_to_max=0.2, share_to_data=0.6), networks, NOISE)
    options: dict[str, Any] = {"steps": 3, "share_to_max": 0.2, "share_to_end": 0.6}
    found = method.trajectory_loss(batch, Draws(1, 40)).value
    plain = trajectory_loss(networks["generator"], networks["teacher"], batch, Draws(1, 40), NOISE, **options).value
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), [*networks["generator"].parameters()]),
        torch.autograd.grad(plain.sum(), [*networks["generator"].parameters()], materialize_grads=True),
    )


@pytest.mark.parametrize("option", ["warmup_images", "trajectory_images"])
def test_a_warmup_without_trajectories_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} has no effect: set trajectory_steps above 0"):
        (CoSIM if option == "warmup_images" else FMD).Config(**{option: 100})


def test_a_stride_beyond_the_trajectory_is_refused() -> None:
    CoSIM.Config(trajectory_steps=4, trajectory_stride=4)
    with pytest.raises(ValueError, match="set trajectory_steps to trajectory_stride at least"):
        CoSIM.Config(trajectory_steps=4, trajectory_stride=5)
