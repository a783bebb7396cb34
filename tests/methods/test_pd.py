"""PD: its minimum is the map of two DDIM steps of the teacher's, on every second of its levels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, Toy, over, teacher, truth
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.pd import PD, PDConfig
from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.trigflow import cos_sin, ddim_step, sigma_to_time

Make = Callable[..., Any]
Flow = Callable[[Tensor, Tensor], Tensor]
NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
ROWS = 200


def batch(rows: int = ROWS) -> Batch:
    x0 = torch.randn(rows, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch(0.3 * x0, None)


def fan(x: Tensor, t: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
    """F of a teacher that is not linear."""
    return teacher(x, t) + over(x, t).sin() * torch.sin(3 * x)


def times_of(steps: int) -> Tensor:
    sigmas = PD.schedule(PDConfig(steps=steps), NOISE)
    return sigma_to_time(torch.tensor([*sigmas, 0.0], dtype=torch.float64), SIGMA_DATA)


class Halved(nn.Module):
    """The generator whose step does two of a flow's on the grid of 2 N steps, off by a learned number in F."""

    def __init__(self, flow: Flow, config: PDConfig, off: float = 0.0) -> None:
        super().__init__()
        self.flow, self.times = flow, times_of(2 * config.steps)
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        first = (t[:, None] - self.times).abs().min(1)
        assert first.values.max() < 1e-12
        between, s = self.times[first.indices + 1], self.times[first.indices + 2]
        middle = ddim_step(x, self.flow(x, t), t, between, SIGMA_DATA)
        end = ddim_step(middle, self.flow(middle, between), between, s, SIGMA_DATA)
        cos, sin = cos_sin(t - s, x)
        return (cos * x - end) / (sin * SIGMA_DATA) + self.off


def loss(config: PDConfig, generator: Any, flow: Any = fan, rows: int = ROWS) -> Any:
    return PD(config, {"teacher": flow, "generator": generator}, NOISE).halving_loss(batch(rows), Draws(0, rows))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_minimum_is_two_of_the_teachers_steps(steps: int) -> None:
    """There loss and gradient are 0; elsewhere the loss is the square of what F is off."""
    config, found = PDConfig(steps=steps), []
    for off in (0.0, 0.1):
        generator = Halved(fan, config, off)
        value = loss(config, generator).value
        value.mean().backward()
        found.append((value.detach(), float(generator.off.grad)))
    (value, slope), (value_off, slope_off) = found
    assert value.max() < 1e-20
    assert abs(slope) < 1e-9
    torch.testing.assert_close(value_off, torch.full_like(value_off, 0.01))
    assert slope_off == pytest.approx(0.2)


def test_stages_end_at_the_teachers_images() -> None:
    """8 steps of DDIM, halved three times: every stage takes the same noise to the same image in its own sampler."""
    images, flow = [], fan
    noise = torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for steps in (8, 4, 2, 1):
        config = PDConfig(steps=steps)
        if steps < 8:
            flow = Halved(flow, config)

        def jump(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, flow: Flow = flow) -> Tensor:
            t, s = t.expand(len(x)), s.expand(len(x))
            return ddim_step(x, flow(x, t), t, s, SIGMA_DATA)

        times, gamma = times_of(steps)[:-1], PD.sampling(config).gamma
        images.append(gamma_sampler(jump, noise, times=times, sigma_data=SIGMA_DATA, gamma=gamma))
    for image in images[1:]:
        torch.testing.assert_close(image, images[0])


def test_of_many_steps_the_minimum_is_the_flow_itself() -> None:
    """DDIM's error falls with the square of the step; the exact jump of Gaussian data is known."""

    def error(steps: int) -> float:
        times = times_of(steps)

        def jump(x: Tensor, t: Tensor) -> Tensor:
            after = times[(t[:, None] - times).abs().argmin(1) + 1]
            return truth(x, t, t - after)

        return float(loss(PDConfig(steps=steps), Toy(jump), Toy(teacher)).value.mean().sqrt())

    assert error(64) < 0.01
    assert error(64) / error(128) > 1.8


def test_the_levels_are_every_second_of_the_teachers() -> None:
    of = {steps: PD.schedule(PDConfig(steps=steps), NOISE) for steps in (1, 2, 4, 8)}
    assert {levels[0] for levels in of.values()} == {NOISE.sigma_max}
    for steps in (1, 2, 4):
        assert of[2 * steps][::2] == pytest.approx(of[steps])
    assert of[1] == pytest.approx((80.0,))
    torch.testing.assert_close(times_of(8).diff(), -times_of(1)[0].expand(8) / 8)


def test_the_weight_is_of_the_images_error() -> None:
    """SNR + 1, or max(SNR, 1), with SNR = (sigma_d / sigma)^2."""
    for weighting, weight in (("snr+1", lambda snr: snr + 1), ("truncated", lambda snr: snr.clamp(min=1))):
        config = PDConfig(steps=8, weighting=weighting)
        found = loss(config, Halved(fan, config, 0.1))
        exact = loss(config, Halved(fan, config))
        error = (found.generated - exact.generated).square().mean((1, 2, 3)) / SIGMA_DATA**2
        torch.testing.assert_close(found.value.detach(), weight(found.t.tan() ** -2) * error)


def test_the_first_step_starts_from_noise_alone() -> None:
    """So the stage of one step reads no data; later steps start from noisy data."""
    for steps, reads in ((1, False), (4, True)):
        method = PD(PDConfig(steps=steps), {"teacher": fan, "generator": fan}, NOISE)
        of_nothing = batch()._replace(x0=torch.full((ROWS, 1, 2, 2), torch.nan, dtype=torch.float64))
        full, empty = (method.halving_loss(each, Draws(0, ROWS)) for each in (batch(), of_nothing))
        first = full.t > 1.56
        assert torch.equal(full.value[first], empty.value[first])
        assert bool(first.all()) != reads
        assert empty.value[~first].isnan().all()


def test_two_passes_of_the_teacher_and_one_of_the_generator() -> None:
    """Of every row, of which each step of the generator has about as many."""
    calls = []

    def counted(name: str) -> Callable[..., Tensor]:
        def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            calls.append((name, len(x)))
            return fan(x, t)

        return network

    found = loss(PDConfig(steps=4), counted("generator"), counted("teacher"))
    assert calls == [("teacher", ROWS)] * 2 + [("generator", ROWS)]
    shares = [float((found.t - t).abs().lt(1e-12).double().mean()) for t in times_of(4)[:-1]]
    assert shares == pytest.approx([0.25] * 4, abs=0.1)


def test_both_of_the_teachers_steps_are_guided(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """By the weight of each row, which the generator reads."""
    options: dict[str, Any] = {"guidance": (1.0, 3.0), "guide": "network"}
    networks, seen = tiny_networks(PD, **options), []

    def guided(x: Tensor, t: Tensor, labels: Tensor, w: Tensor) -> Tensor:
        F, F_guide = (networks[name](x, t, labels) for name in ("teacher", "guide"))
        return F_guide + over(x, w) * (F - F_guide)

    def generator(x: Tensor, t: Tensor, labels: Tensor, *, w: Tensor) -> Tensor:
        seen.append(w)
        return Halved(lambda x, t: guided(x, t, labels, w), PDConfig(steps=3))(x, t)

    method = PD(PDConfig(steps=3, **options), networks | {"generator": generator}, noise)
    assert method.halving_loss(tiny_batch(), Draws(0, 6)).value.max() < 1e-20
    assert len(set(seen[0].tolist())) == 6


def test_steps_below_the_teachers_noise_levels_are_refused(tiny_networks: Make) -> None:
    PD(PDConfig(steps=195), tiny_networks(PD), NOISE)
    with pytest.raises(EdmDistillError, match=r"steps = 196 asks the teacher below 0.002, .*: set it to 195 at most$"):
        PD(PDConfig(steps=196), tiny_networks(PD), NOISE)
