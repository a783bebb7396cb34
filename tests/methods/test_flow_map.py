"""Flow maps: closed forms for Gaussian data, and the limits s = 0 and s -> t."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, TIMES, Toy, answer, images, over, spread, teacher, truth
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange, with_inputs
from edmdistill.methods.consistency import normalized_tangent
from edmdistill.methods.flow_map import lagrangian_tangent
from edmdistill.methods.fmd import FMD, FMDConfig
from edmdistill.methods.mean_flow import MeanFlow, MeanFlowConfig
from edmdistill.methods.scd import SCD, SCDConfig
from edmdistill.methods.scm import continuous_tangent
from edmdistill.methods.sct import SCT, SCTConfig
from edmdistill.schedules import interval_times, lognormal_pairs
from edmdistill.trigflow import ddim_step, diffuse, velocity

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
SHARES = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)


class MapToy(nn.Module):
    """A network of two times, from a function of x, t and s."""

    def __init__(self, F) -> None:
        super().__init__()
        self.F = F

    def forward(self, x: Tensor, t: Tensor, labels=None, second=None, u_at=(), along=(), w=None):
        return answer(self.F, (x, t, second), along, *map(torch.zeros_like, u_at))


TRUTH = MapToy(lambda x, t, s: truth(x, t, t - s))


def flow_velocity(x: Tensor, t: Tensor) -> Tensor:
    return SIGMA_DATA * teacher(x, t)


# Closed forms: both conditions hold for the true map, between any two times.


@pytest.mark.parametrize("share", SHARES)
def test_the_true_map_has_no_eulerian_residual(share: Tensor) -> None:
    x, s = images(), share * TIMES
    network = with_inputs(TRUTH, second=s)
    dx = flow_velocity(x, TIMES)
    _, g, _ = continuous_tangent(network, x, TIMES, None, dx, d=TIMES - s, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,))
    assert float(g.abs().max()) < 1e-10


@pytest.mark.parametrize("share", SHARES)
def test_the_true_map_has_no_lagrangian_residual(share: Tensor) -> None:
    _, g, _ = lagrangian_tangent(
        TRUTH, flow_velocity, images(), TIMES, share * TIMES, None, sigma_data=SIGMA_DATA, u_at=(TIMES,)
    )
    assert float(g.abs().max()) < 1e-10


WAVES = MapToy(lambda x, t, s: torch.sin(3 * x) * over(x, t).cos() + 0.2 * x * over(x, s).sin())


def test_the_eulerian_tangent_is_the_plain_one() -> None:
    """cos(d) df/dt, by finite differences of the jump along the trajectory, to the same s."""
    x, t, s, h = images(), TIMES, 0.6 * TIMES, 1e-5
    dx = flow_velocity(x, t)

    def f(h: float) -> Tensor:
        start = x + h * dx
        return ddim_step(start, WAVES(start, t + h, None, s), t + h, s, SIGMA_DATA)

    expected = over(x, (t - s).cos()) * (f(h) - f(-h)) / (2 * h)
    network = with_inputs(WAVES, second=s)
    _, g, _ = continuous_tangent(network, x, t, None, dx, d=t - s, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,))
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-9)


def test_the_lagrangian_tangent_is_the_plain_one() -> None:
    """-cos(s) sin(s) (df/ds - v(f, s)), df/ds by finite differences of the jump."""
    x, t, s, h = images(), TIMES, 0.6 * TIMES, 1e-5

    def f(s: Tensor) -> Tensor:
        return ddim_step(x, WAVES(x, t, None, s), t, s, SIGMA_DATA)

    slope = (f(s + h) - f(s - h)) / (2 * h)
    expected = -over(x, s.cos() * s.sin()) * (slope - flow_velocity(f(s), s))
    F, g, _ = lagrangian_tangent(WAVES, flow_velocity, x, t, s, None, sigma_data=SIGMA_DATA, u_at=(TIMES,))
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(F, WAVES(x, t, None, s))


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_gradients_flow_through_f_alone(objective: str) -> None:
    """With F^- and g as numbers, the gradient is the one by hand; the generator is called once."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    calls = []

    def F(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return weight * torch.sin(3 * x) * over(x, t).cos() + 0.2 * x * over(x, s).sin()

    class Watched(MapToy):
        def forward(self, *args, **options):
            calls.append((args[0], args[1]))
            return super().forward(*args, **options)

    made = FMD(FMDConfig(objective=objective), {"teacher": Toy(teacher), "generator": Watched(F)}, NOISE)
    times, tangents = made.draw_times(Draws(0, 5)), []
    tangent = made.tangent
    made.tangent = lambda *args: tangents.append(tangent(*args)) or tangents[-1]
    loss = made.generator_loss(Batch(images(), None), Draws(0, 5))
    ((x, t),), ((_, g, *_),) = calls, tangents
    assert torch.equal(t, times[0])
    g = normalized_tangent(g, 0.1, "rms")
    expected = (-2 / x[0].numel() * g * torch.sin(3 * x) * over(x, t).cos()).sum()
    torch.testing.assert_close(torch.autograd.grad(loss.value.sum(), weight)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"objective": "eulerian"}, {"objective": "lagrangian"}, {"trajectory_steps": 2, "trajectory_images": 1}],
    ids=["eulerian", "lagrangian", "trajectories"],
)
def test_the_weight_is_that_of_a_jump_s_start_and_end(options: dict[str, Any]) -> None:
    asked = []

    class Watched(MapToy):
        def forward(self, x, t, labels=None, second=None, u_at=(), **others):
            asked.append((t, second, u_at))
            return super().forward(x, t, labels, second, u_at, **others)

    made = FMD(FMDConfig(**options), {"teacher": Toy(teacher), "generator": Watched(WAVES.F)}, NOISE)
    made.generator_loss(Batch(images(), None), Draws(0, 5))
    ((t, s, u_at),) = asked
    assert (s < t).all()
    torch.testing.assert_close(u_at, (t, s))


# Limits.


@pytest.mark.parametrize(("flow_map", "config", "consistency", "other"), [
    (FMD, FMDConfig, SCD, SCDConfig), (MeanFlow, MeanFlowConfig, SCT, SCTConfig),
])  # fmt: skip
def test_jumps_to_the_data_are_scm(flow_map, config, consistency, other, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same times, loss and gradient are those of sCD, and of sCT, bit for bit."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def F(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        return weight * torch.sin(x) * over(x, t)

    batch, results = Batch(images(), None), []
    for method, options, network in ((flow_map, config, MapToy(F)), (consistency, other, Toy(F))):
        made = method(options(), {"teacher": Toy(teacher), "generator": network}, NOISE)
        monkeypatch.setattr(made, "draw_times", lambda draws: (TIMES, TIMES))
        loss = made.generator_loss(batch, Draws(0, 5)).value
        results.append((loss, *torch.autograd.grad(loss.sum(), [weight])))
    for ours, theirs in zip(*results, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_short_jumps_are_diffusion_training(objective: str) -> None:
    """As s -> t, g is the difference to the velocity: the direction of -|sigma_d F - v|^2."""
    network = MapToy(lambda x, t, s: torch.sin(3 * x) * over(x, t).cos() + 0.2 * x * over(x, s))
    x, s = images(), TIMES - 1e-7
    error = SIGMA_DATA * network(x, TIMES, None, TIMES) - flow_velocity(x, TIMES)
    if objective == "eulerian":
        _, g, _ = continuous_tangent(
            with_inputs(network, second=s), x, TIMES, None, flow_velocity(x, TIMES),
            d=TIMES - s, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,),
        )  # fmt: skip
        expected = -error
    else:
        _, g, _ = lagrangian_tangent(network, flow_velocity, x, TIMES, s, None, sigma_data=SIGMA_DATA, u_at=(TIMES,))
        expected = -over(x, TIMES.cos() * TIMES.sin()) * error
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-6)


def test_the_data_velocity_is_the_teacher_s_in_expectation() -> None:
    """MeanFlow's identity: averaged over data and noise given x_t, its tangent is the Eulerian one of the true flow.

    What varies is cos(d) J (v - E[v | x_t]), where J is the derivative of the jump.
    """
    rows = 200_000
    draws = Draws(3, rows)
    t, s = torch.full((rows,), 0.9, dtype=torch.float64), torch.full((rows,), 0.3, dtype=torch.float64)
    x0, z = STD * draws.normal(1, 1, 1), SIGMA_DATA * draws.normal(1, 1, 1)
    x_t = diffuse(x0, z, t)
    _, g, _ = continuous_tangent(
        with_inputs(TRUTH, second=s),
        x_t,
        t,
        None,
        velocity(x0, z, t),
        d=t - s,
        r=1.0,
        sigma_data=SIGMA_DATA,
        u_at=(TIMES,),
    )
    # Linear in x_t for Gaussian data, so uncorrelated with x_t is zero for every x_t.
    slope, deviation = float((g * x_t).mean() / x_t.square().mean()), float(g.std() / x_t.std())
    velocities = velocity(x0, z, t) - flow_velocity(x_t, t)
    J = spread(s[0]) / spread(t[0])
    assert deviation == pytest.approx(float((t - s)[0].cos() * J * velocities.std() / x_t.std()), rel=1e-9)
    assert deviation > 0.1  # a single pair is far from it
    assert abs(slope) < 5 * deviation / math.sqrt(rows)


def test_the_second_time_can_count_from_the_start() -> None:
    assert FMD.roles_for(FMDConfig(s_gain=0.5))["generator"].second_gain == 0.5
    assert MeanFlow.roles_for(MeanFlowConfig())["generator"].second_gain == 0


# Learning.


class Layer(MapToy):
    """One layer over three functions, of which the first is the true map's."""

    def __init__(self) -> None:
        super().__init__(self.sum)
        self.weights = nn.Parameter(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))

    def sum(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        terms = truth(x, t, t - s), teacher(x, t), x * over(x, s).sin()
        return sum((weight * term for weight, term in zip(self.weights, terms, strict=True)), torch.zeros_like(x))


@torch.no_grad()
def jump(network: nn.Module, x: Tensor, t: float, s: float) -> Tensor:
    start, end = (torch.full((len(x),), time, dtype=torch.float64) for time in (t, s))
    return ddim_step(x, network(x, start, None, end), start, end, SIGMA_DATA)


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_a_layer_learns_the_true_map(objective: str) -> None:
    """Jumps then compose, and more steps without noise are as good as one."""
    network = Layer()
    made = FMD(FMDConfig(objective=objective), {"teacher": Toy(teacher), "generator": network}, NOISE)

    def composition_error() -> float:
        x, points = images(), (1.5, 0.9, 0.2)
        twice = jump(network, jump(network, x, *points[:2]), *points[1:])
        return float((twice - jump(network, x, points[0], points[2])).abs().max())

    def spread_after(steps: int) -> float:
        """The standard deviation of samples, over that of the data."""
        times = [math.atan(80 / SIGMA_DATA) * (1 - i / steps) for i in range(steps + 1)]
        x = torch.full((1, 1, 1, 1), float(spread(torch.tensor(times[0]))), dtype=torch.float64)
        for t, s in pairwise(times):
            x = jump(network, x, t, s)
        return x.item() / STD

    assert composition_error() > 0.05
    # Without momentum, by which the Eulerian objective oscillates.
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, betas=(0.0, 0.99))
    for step in range(100):
        draws = Draws([0, step], 32)
        made.generator_loss(Batch(STD * draws.normal(1, 2, 2), None), draws).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert composition_error() < 1e-4
    assert [spread_after(steps) for steps in (1, 2, 4, 8)] == pytest.approx([1.0] * 4, abs=1e-4)


# Intervals.


def test_interval_times() -> None:
    t_max, rows = 1.5, 20_000
    t, d = interval_times(Draws(0, rows), t_max, P_mean=-0.8, P_std=1.0, share_to_data=0.25)
    assert (t > 0).all()
    assert (t <= t_max).all()
    assert (d > 0).all()
    assert (d <= t).all()
    to_data = d == t
    assert float(to_data.double().mean()) == pytest.approx(0.25, abs=0.015)
    logit = (d[~to_data] / t_max).logit()
    assert float(logit.mean()) == pytest.approx(-0.8, abs=0.04)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.03)
    place = ((t - d) / (t_max - d))[~to_data]  # uniform over what is left
    assert float(place.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(place.std()) == pytest.approx(12**-0.5, abs=0.01)


def test_lognormal_pairs() -> None:
    rows, t_max = 20_000, 1.5
    t, d = lognormal_pairs(Draws(0, rows), SIGMA_DATA, t_max, P_mean=-2.0, P_std=1.5)
    assert (t <= t_max).all()
    assert (d >= 0).all()
    logs = (SIGMA_DATA * torch.cat([t, t - d]).tan()).log()  # the larger and the smaller are two draws together
    assert float(logs.mean()) == pytest.approx(-2.0, abs=0.04)
    assert float(logs.std()) == pytest.approx(1.5, abs=0.03)
    assert float(logs[:rows].mean() - logs[rows:].mean()) == pytest.approx(2 / math.pi**0.5 * 1.5, abs=0.05)


def test_lognormal_pairs_of_two_laws() -> None:
    """So far apart that the larger is always of the first, or of the second."""
    rows, t_max = 20_000, 1.5
    for first, second in ((-1.0, -5.0), (-5.0, -1.0)):
        law = {"P_mean": first, "P_std": 0.3, "P_mean_s": second, "P_std_s": 0.5}
        t, d = lognormal_pairs(Draws(0, rows), SIGMA_DATA, t_max, **law)
        stds = {first: 0.3, second: 0.5}
        for time, mean in ((t, -1.0), (t - d, -5.0)):
            log = (SIGMA_DATA * time.tan()).log()
            assert float(log.mean()) == pytest.approx(mean, abs=0.02)
            assert float(log.std()) == pytest.approx(stds[mean], abs=0.02)


def test_the_jumps_are_those_of_the_options() -> None:
    """Of either law, over the teacher's noise levels."""
    law: dict[str, float] = {"P_mean": -1.3, "P_std": 0.7, "share_to_data": 0.1}
    t_max = math.atan(30 / 0.4)
    expected = {
        "interval": interval_times(Draws(0, 50), t_max, **law),
        "lognormal": lognormal_pairs(Draws(0, 50), 0.4, t_max, **law, P_mean_s=-2.0, P_std_s=0.2),
    }
    for times, jumps in expected.items():
        other: dict[str, float] = {"P_mean_s": -2.0, "P_std_s": 0.2} if times == "lognormal" else {}
        made = MeanFlow(MeanFlowConfig(times=times, **law, **other), {"generator": TRUTH}, NoiseRange(0.4, 0.01, 30.0))
        assert all(map(torch.equal, made.draw_times(Draws(0, 50)), jumps))


def test_a_share_of_jumps_has_no_length() -> None:
    """Those are diffusion training, of whatever t."""
    config = MeanFlowConfig(times="lognormal", P_mean=-2.0, P_std=2.0, share_to_data=0.0, share_still=0.25)
    made = MeanFlow(config, {"generator": TRUTH}, NOISE)
    t, d = made.draw_times(Draws(0, 20_000))
    assert float((d == 0).double().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(t[d == 0].mean()) == pytest.approx(float(t[d > 0].mean()), abs=0.02)
    x, dx = images(), flow_velocity(images(), TIMES)
    network = with_inputs(WAVES, second=TIMES)
    F, g, _ = continuous_tangent(network, x, TIMES, None, dx, d=0 * TIMES, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,))
    torch.testing.assert_close(g, dx - SIGMA_DATA * F)
