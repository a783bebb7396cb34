"""dsCD: its tangent tends to the continuous one, and is 0 where the generator is true to the teacher's steps."""

from itertools import pairwise

import pytest
import torch
from methods_toys import SIGMA_DATA, TIMES, Toy, images, over, spread, teacher
from tolerance import assert_rounded

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.dscd import DSCD, DSCDConfig, discrete_tangent
from edmdistill.methods.scm import continuous_tangent
from edmdistill.schedules import discrete_lognormal, edm_curve
from edmdistill.trigflow import ddim_step, denoised, sigma_to_time


def test_it_tends_to_the_continuous_tangent() -> None:
    """The difference falls with the step."""
    x, t = images(), TIMES
    network = Toy(lambda x, t: torch.sin(3 * x) * over(x, t).cos())
    dx = SIGMA_DATA * teacher(x, t)
    errors = []
    for step in (1e-3, 5e-4):
        F, g, _ = discrete_tangent(network, x, t, t - step, None, dx, r=0.7, sigma_data=SIGMA_DATA, u_at=(TIMES,))
        F_exact, exact, _ = continuous_tangent(
            network, x, t, None, dx, d=t, r=0.7, sigma_data=SIGMA_DATA, u_at=(TIMES,)
        )
        assert_rounded(F, F_exact, 10)  # func.jvp's value may be by other kernels
        errors.append(float((g - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_it_is_the_difference_of_the_two_ends() -> None:
    """At r = 1, sin(t - t') Delta = f(x_t, t) - f(x_t', t'), so it is 0 where the generator agrees with the step."""
    x, t, before = images(), TIMES, 0.8 * TIMES
    network = Toy(lambda x, t: torch.sin(3 * x) * over(x, t).cos())
    dx = SIGMA_DATA * teacher(x, t)
    _, g, _ = discrete_tangent(network, x, t, before, None, dx, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,))
    x_before = ddim_step(x, dx / SIGMA_DATA, t, before, SIGMA_DATA)
    gap = denoised(x, network(x, t), t, SIGMA_DATA) - denoised(x_before, network(x_before, before), before, SIGMA_DATA)
    expected = over(x, t).cos() * gap / over(x, t - before).sin()
    torch.testing.assert_close(-g, -expected, rtol=1e-10, atol=1e-13)


def test_gradients_flow_through_f_alone() -> None:
    """Not through the other end of the step, which is a target."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    network = Toy(lambda x, t: weight * torch.sin(3 * x) * over(x, t).cos())
    dx = SIGMA_DATA * teacher(images(), TIMES)
    F, g, _ = discrete_tangent(
        network, images(), TIMES, 0.8 * TIMES, None, dx, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,)
    )
    assert F.requires_grad
    assert not g.requires_grad


def test_t_and_the_time_before_are_neighbors_on_edms_grid() -> None:
    """The lowest level's is 0, the data; the log variance is t's."""
    noise, seen = NoiseRange(SIGMA_DATA, 0.002, 80.0), list[tuple[torch.Tensor, torch.Tensor]]()

    def generator(x, t, labels, *, u_at=()):
        seen.append((x, t))
        assert all(at.equal(t) for at in u_at)
        return (x, *u_at) if u_at else x

    networks = {"teacher": lambda x, t, labels: x, "generator": generator}
    method = DSCD(DSCDConfig(intervals=5, P_std=4.0), networks, noise)
    (turn,) = method.turns()
    turn.loss(Batch(torch.zeros(500, 1, 2, 2), None), Draws(0, 500))
    (_, before), (x, t) = seen
    assert float((x / over(x, t).sin()).std()) == pytest.approx(SIGMA_DATA, rel=0.1)  # all noise, as the data are 0
    grid = torch.cat([torch.zeros(1), edm_curve(torch.arange(1, 6, dtype=torch.float64) / 5, 0.002, 80.0)])
    pairs = {(round(float(a), 9), round(float(b), 9)) for a, b in zip(before, t, strict=True)}
    assert pairs == {(round(a, 9), round(b, 9)) for a, b in pairwise(sigma_to_time(grid, SIGMA_DATA).tolist())}


def test_probabilities_of_the_levels() -> None:
    """With many levels, mean and standard deviation are those of the distribution."""
    sigmas = edm_curve(torch.linspace(0.001, 1, 2000), 0.002, 80.0)
    probabilities = discrete_lognormal(sigmas, P_mean=-0.9, P_std=1.1)
    mean = float((probabilities * sigmas.log()).sum())
    assert float(probabilities.sum()) == pytest.approx(1)
    assert mean == pytest.approx(-0.9, abs=0.02)
    assert float((probabilities * (sigmas.log() - mean) ** 2).sum()) ** 0.5 == pytest.approx(1.1, rel=0.02)
    assert spread(torch.tensor(0.0)) == 0.3
