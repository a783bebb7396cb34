"""sCM: closed forms for Gaussian data, the gradient of its loss, and a small network that learns the exact function."""

import math

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, TIMES, Scaled, Toy, images, over, spread, teacher, truth
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.methods.base import Batch, NoiseRange, Sampling, with_inputs
from edmdistill.methods.consistency import consistency_loss, normalized_tangent, tangent_loss, tangent_warmup
from edmdistill.methods.fmd import FMD
from edmdistill.methods.scd import SCD, SCDConfig
from edmdistill.methods.scm import continuous_tangent, time_in_interval
from edmdistill.methods.sct import SCT, SCTConfig
from edmdistill.methods.tangents import TANGENTS, finite_difference
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

# Closed forms.


@pytest.mark.parametrize("intervals", [1, 2, 8])
def test_the_exact_function_has_no_tangent(intervals: int) -> None:
    x, d = images(), time_in_interval(TIMES, intervals)
    starts = TIMES - d
    network = Toy(lambda x, t: truth(x, t, t - starts))
    _, g, _ = continuous_tangent(
        network, x, TIMES, None, SIGMA_DATA * teacher(x, TIMES), d=d, r=1.0, sigma_data=SIGMA_DATA, u_at=(TIMES,)
    )
    assert float(g.abs().max()) < 1e-10


def test_the_rearranged_tangent_is_the_plain_one() -> None:
    """cos(d) df/dt with the whole trajectory's derivative, where that still has digits."""
    x, t, d = images(), TIMES, time_in_interval(TIMES, 2)
    network = Toy(lambda x, t: torch.sin(3 * x) * over(x, t).cos() + 0.2 * over(x, t))
    dx = torch.cos(2 * x)
    F, dF = network(x, t, along=(dx, torch.ones_like(t)))
    cos, sin = over(x, d).cos(), over(x, d).sin()
    for r in (0.0, 0.3, 1.0):
        expected = cos * (-cos * (SIGMA_DATA * F - dx) - r * sin * (x + SIGMA_DATA * dF))
        again, g, _ = continuous_tangent(network, x, t, None, dx, d=d, r=r, sigma_data=SIGMA_DATA, u_at=(TIMES,))
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(again, F)


def test_a_finite_difference_is_the_tangent_up_to_h_squared() -> None:
    x, t = images(), TIMES
    network = Toy(lambda x, t: torch.sin(3 * x) * over(x, t).cos())
    dx, dt = torch.cos(2 * x), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    F, exact = network(x, t, along=(dx, dt))
    errors = []
    for h in (1e-2, 5e-3):
        again, found, u = finite_difference(network, x, t, None, dx, dt, (t,), h)
        assert torch.equal(again, F)
        assert not u.any()
        errors.append(float((found - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)


def test_tangents_are_of_the_same_class_and_log_variances(tiny_networks, tiny_batch) -> None:
    x, labels, *_ = tiny_batch(5)
    network, dx = with_inputs(tiny_networks(FMD)["generator"], second=TIMES / 2), torch.cos(2 * x)
    exact, near = (
        tangent(network, x, TIMES, labels, dx, torch.ones_like(TIMES), (TIMES, TIMES / 2))
        for tangent in TANGENTS.values()
    )
    torch.testing.assert_close(exact[1], near[1], rtol=0, atol=1e-4)
    for k in (0, 2, 3):  # F and both log variances
        torch.testing.assert_close(exact[k], near[k])


def test_a_tangent_has_no_gradient() -> None:
    """F has, by both methods."""
    weight, one = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.ones_like(TIMES)
    network = Toy(lambda x, t: weight * torch.sin(3 * x) * over(x, t).cos())
    for tangent in TANGENTS.values():
        F, dF, _ = tangent(network, images(), TIMES, None, torch.cos(images()), one, (TIMES,))
        assert F.requires_grad
        assert not dF.requires_grad


def test_intervals() -> None:
    assert time_in_interval(TIMES, 1).equal(TIMES)
    length = math.pi / 6
    t = torch.tensor([0.0, 0.5 * length, length, 2.25 * length, math.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(time_in_interval(t, 3), length * torch.tensor([0.0, 0.5, 0.0, 0.25, 1.0]).double())


def test_steps_begin_where_intervals_end() -> None:
    """The first at the highest level, and none above it."""
    noise = NoiseRange(SIGMA_DATA, 0.002, 80.0)
    assert (SCT.schedule(SCTConfig(), noise), SCT.sampling(SCTConfig())) == ((), Sampling())
    for intervals, levels in ((2, (80, 0.5)), (3, (80, 0.75**0.5, 12**-0.5))):
        config = SCTConfig(intervals=intervals)
        assert SCT.schedule(config, noise) == pytest.approx(levels)
        assert SCT.sampling(config) == Sampling(intervals, gamma=0.0)


@pytest.mark.parametrize(("sigma_data", "sigma_max"), [(0.5, 80.0), (0.5, 152.0), (1.0, 20.0)])
def test_intervals_above_the_highest_level_are_refused(sigma_data: float, sigma_max: float) -> None:
    noise = NoiseRange(sigma_data, 0.002, sigma_max)
    with pytest.raises(EdmDistillError, match=r"intervals = 1000 makes .* set it to \d+ at most") as error:
        SCT.schedule(SCTConfig(intervals=1000), noise)
    most = int(str(error.value).split()[-3])
    first, second, *_ = SCT.schedule(SCTConfig(intervals=most), noise)
    assert first == sigma_max > second
    with pytest.raises(EdmDistillError, match="above the teacher's highest noise level"):
        SCT.schedule(SCTConfig(intervals=most + 1), noise)


def test_noise_levels_are_lognormal() -> None:
    options = {"P_mean": -0.4, "P_std": 0.7}
    t, d = make(SCT, Toy(teacher), **options, intervals=2).draw_times(Draws(0, 4000))
    logs = (SIGMA_DATA * t.tan()).log()
    assert float(logs.mean()) == pytest.approx(-0.4, abs=0.04)
    assert float(logs.std()) == pytest.approx(0.7, abs=0.03)
    assert torch.equal(d, time_in_interval(t, 2))


# The loss.


def test_the_gradient_is_that_of_the_inner_product() -> None:
    """In F, 2 e^-u / D times that of -F . g; in u, 0 where e^u is the mean square."""
    generator = torch.Generator().manual_seed(1)
    F, g = (torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    F.requires_grad_(True)
    u = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    consistency_loss(F, g, u, TIMES).value.sum().backward()
    expected = -2 * (-u.detach()).exp().reshape(-1, 1, 1, 1) * g / g[0].numel()
    torch.testing.assert_close(F.grad, expected, rtol=1e-12, atol=0)
    mean = g.square().flatten(1).mean(1)
    torch.testing.assert_close(u.grad, 1 - (-u.detach()).exp() * mean, rtol=1e-12, atol=1e-14)


def test_without_adaptive_weighting_all_times_weigh_the_same() -> None:
    F, g = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4)
    u = torch.linspace(-1, 1, 5, requires_grad=True)
    loss = consistency_loss(F, g, u, TIMES, "none").value
    torch.testing.assert_close(loss, g.square().flatten(1).mean(1))
    assert torch.autograd.grad(loss.sum(), u, allow_unused=True) == (None,)


def test_normalized_tangent() -> None:
    g = torch.stack([torch.full((4, 4, 4), 3.0), torch.full((4, 4, 4), -0.1), torch.zeros(4, 4, 4)])
    torch.testing.assert_close(normalized_tangent(g, 0.1, "rms")[:, 0, 0, 0], torch.tensor([3 / 3.1, -0.5, 0]))
    torch.testing.assert_close(normalized_tangent(g, 0.1, "norm")[:, 0, 0, 0], torch.tensor([3 / 24.1, -0.1 / 0.9, 0]))
    torch.testing.assert_close(normalized_tangent(g, 0.1, "clip")[:, 0, 0, 0], torch.tensor([1, -0.1, 0]))
    assert normalized_tangent(g, 0.1, "raw").equal(g)
    power = normalized_tangent(g, 0.1, "power", 0.5)[:, 0, 0, 0]
    torch.testing.assert_close(power, torch.tensor([3 / 576.1**0.5, -0.1 / (0.64 + 0.1) ** 0.5, 0]))


@pytest.mark.parametrize("normalization", ["rms", "norm", "power", "clip", "raw"])
def test_the_tangents_size_is_measured_before_it_is_normalized(normalization: str) -> None:
    """A tangent that grows is to be seen, though the loss makes it no larger."""
    F, u, g = torch.zeros(5, 3, 4, 4), torch.zeros(5), torch.full((5, 3, 4, 4), -70.0)
    config = SCTConfig(tangent_normalization=normalization)
    loss = tangent_loss(F, g, u, TIMES, config)
    assert float(loss.signals["tangent_rms"]) == pytest.approx(70)
    expected = consistency_loss(F, normalized_tangent(g, config.c, normalization), u, TIMES).value
    assert torch.equal(loss.value, expected)


@pytest.mark.parametrize("normalization", ["clip", "raw"])
def test_a_constant_that_is_not_read_is_refused(normalization: str) -> None:
    with pytest.raises(ValueError, match=f'with tangent_normalization = "{normalization}", c has no effect'):
        SCTConfig(tangent_normalization=normalization, c=0.2)


def test_tangent_warmup() -> None:
    assert [tangent_warmup(images, 1000) for images in (0, 250, 1000, 5000)] == [0, 0.25, 1, 1]
    assert tangent_warmup(0, 0) == 1
    assert [tangent_warmup(images, 1000, 0.99) for images in (0, 250, 992, 5000)] == [0, 0.25, 0.99, 0.99]


def test_the_warmup_ends_at_r_max(tiny_networks, tiny_batch, noise: NoiseRange) -> None:
    def loss(images: int, **options: float) -> Tensor:
        (turn,) = SCT(SCTConfig(**options), networks, noise).turns()
        return turn.loss(tiny_batch()._replace(images=images), Draws(0, 6)).value.detach()

    networks = tiny_networks(SCT)
    assert torch.equal(loss(0, r_max=0.5), loss(50, warmup_images=100))
    assert torch.equal(loss(90, r_max=0.5, warmup_images=100), loss(50, warmup_images=100))
    assert not torch.equal(loss(0, r_max=0.5), loss(0))


@pytest.mark.parametrize("method", [SCD, SCT])
def test_gradients_flow_through_f_and_u_only(method) -> None:
    """With F^- and g as numbers, the gradient is the one by hand."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    level = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    seen = []

    class Watched(Toy):
        def forward(self, *args, **options):
            seen.append((*args, *options["along"]))
            return super().forward(*args, **options)

    network = Watched(lambda x, t: weight * torch.sin(x) * over(x, t), level)
    scm = make(method, network)
    loss = scm.generator_loss(Batch(images(), None), Draws(0, 5))
    (gradient,) = torch.autograd.grad(loss.value.sum(), [weight], retain_graph=True)
    ((x, t, _, dx, dt),) = seen
    draws = Draws(0, 5)
    assert torch.equal(t, scm.draw_times(draws)[0])
    torch.testing.assert_close(x, diffuse(images(), draws.normal_like(x, SIGMA_DATA), t))
    with torch.no_grad():
        cos, sin = over(x, t).cos(), over(x, t).sin()
        torch.testing.assert_close(over(x, dt), cos * sin)
        F, dF = network(x, t, along=(dx, dt))
        g = normalized_tangent(-cos * (cos * SIGMA_DATA * F - dx / sin) - (cos * sin * x + SIGMA_DATA * dF), 0.1, "rms")
        expected = (-2 * (-level).exp() / x[0].numel() * g * torch.sin(x) * over(x, t)).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


# Learning.


class Linear(Scaled):
    """F = a(t) x, a(t) a sum of waves, which can approximate the exact function.  Its tangent is explicit."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def a(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and da/dt."""
        n = torch.tensor([0.0, 2, 2, 4, 4], dtype=torch.float64)
        wave, odd = n * t[:, None], torch.tensor([False, True, False, True, False])
        slope = torch.where(odd, n * wave.cos(), -n * wave.sin())
        return torch.where(odd, wave.sin(), wave.cos()) @ self.weights, slope @ self.weights


@pytest.mark.parametrize("method", [SCD, SCT])
def test_learns_the_exact_function(method) -> None:
    """From the analytic teacher or from data alone, compared in one and two steps with the exact trajectory."""
    network = Linear()
    scm = make(method, network, P_mean=-0.8, P_std=1.6)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 1000)
        draws = Draws([0, step], 64)
        scm.generator_loss(Batch(STD * draws.normal(1, 4, 4), None), draws).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def f(t: float) -> float:
        """The factor by which x_t is taken to the data."""
        time, one = torch.tensor([t], dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        with torch.no_grad():
            return denoised(one, network(one, time), time, SIGMA_DATA).item()

    last, middle = float(sigma_to_time(80.0, SIGMA_DATA)), 1.1
    for t in (0.3, 0.8, middle, last):
        assert f(t) == pytest.approx(STD / float(spread(torch.tensor(t))), rel=0.08)
    two = f(middle) * math.hypot(math.cos(middle) * f(last) * SIGMA_DATA, math.sin(middle) * SIGMA_DATA)
    assert two == pytest.approx(STD, rel=0.05)


def make(method, network: nn.Module, **options: float):
    return method(
        method.Config(**options), {"teacher": Toy(teacher), "generator": network}, NoiseRange(SIGMA_DATA, 0.002, 80.0)
    )


def test_without_the_unstable_term_its_options_are_refused() -> None:
    with pytest.raises(ValueError, match="with r_max = 0, tangent has no effect: set r_max above 0"):
        SCTConfig(r_max=0.0, tangent="finite-difference")


def test_configurations() -> None:
    assert SCDConfig().guidance == (1, 1)
    assert not hasattr(SCTConfig(), "guidance")
