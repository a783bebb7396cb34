"""CoSIM's transition: what is drawn belongs together, and starts where it is asked to."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, Transition
from edmdistill.methods.cosim_config import CoSIMConfig
from edmdistill.trigflow import cos_sin, denoised

Make = Callable[..., Any]


def draw_transition(generator: Any, batch: Batch, draws: Draws, noise: NoiseRange, **options: Any) -> Transition:
    sigma_from = options.pop("sigma_from", 0.0)
    networks = {"teacher": None, "generator": generator, "auxiliary": None}
    return CoSIM(CoSIMConfig(**options), networks, noise).transition(batch, draws, sigma_from)


@pytest.mark.parametrize("order", ["s", "t"])
def test_a_transition_leads_down_from_the_generators_estimate(
    order: str, tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """g is the estimate at x_t, and (x_s, v) the rotation of (g, z) by s, which leads back to g."""
    generator, batch = tiny_networks(CoSIM)["generator"], tiny_batch()
    jump = draw_transition(generator, batch, Draws(0, 6), noise, order=order)
    assert (jump.s < jump.t).all()
    torch.testing.assert_close(jump.F, generator(jump.x_t, jump.t, batch.labels))
    torch.testing.assert_close(jump.g, denoised(jump.x_t, jump.F, jump.t, noise.sigma_data))
    cos, sin = cos_sin(jump.s, jump.x_s)
    torch.testing.assert_close(cos * jump.x_s - sin * jump.v, jump.g)


def test_no_jump_starts_below_the_level_asked_for(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    generator, batch = tiny_networks(CoSIM)["generator"], tiny_batch()
    options = {"order": "t", "share_to_max": 0.0, "sigma_from": 2.0}
    lowest = min(draw_transition(generator, batch, Draws(seed, 6), noise, **options).t.min() for seed in range(20))
    assert math.atan(2.0 / noise.sigma_data) <= lowest < math.atan(4.0 / noise.sigma_data)


@pytest.mark.parametrize("order", ["s", "t"])
def test_the_first_step_starts_at_the_teacher_s_highest_level(
    order: str, tiny_networks: Make, tiny_batch: Make
) -> None:
    """And no level is below its lowest, but for the data."""
    generator, noise = tiny_networks(CoSIM)["generator"], NoiseRange(0.5, 0.3, 8.0)
    jump = draw_transition(generator, tiny_batch(400), Draws(0, 400), noise, order=order)
    s, t = (noise.sigma_data * time.tan() for time in (jump.s, jump.t))
    assert float(t.max()) == pytest.approx(8.0)
    assert float(torch.cat([s, t]).min()) > 0.299


@pytest.mark.parametrize("steps", [0, 2])
def test_images_are_judged_where_the_generator_learns(
    steps: int, tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    """With trajectories, which teach jumps from below the anchor, from above alone: as in the generator's own turn."""
    options = {"gan": 1.0, "order": "t", "share_to_max": 0.0, "anchor_sigma": 2.0, "trajectory_steps": steps}
    method = CoSIM(CoSIMConfig(**options), tiny_networks(CoSIM, **options), noise)
    lowest = min(float(method.fake(tiny_batch(), Draws(seed, 6))[1].min()) for seed in range(20))
    assert (lowest >= math.atan(2.0 / noise.sigma_data) - 1e-9) == bool(steps)
