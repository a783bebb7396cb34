"""The gamma-sampler against closed forms, in float64.

Data N(0, c^2) with c != sigma_data: then x_t ~ N(0, v(t)), v = cos^2 c^2 + sin^2 sigma_data^2, and the denoiser, the
posterior and the consistency function are all linear.
"""

import math

import pytest
import torch
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.trigflow import ddim_step, diffuse, implied_noise

SIGMA_DATA = 0.5
C = 0.8
SCHEDULES = [[math.pi / 2], [1.5645, 1.1], [1.5645, 1.373, 0.4], [1.57, 1.4, 1.4, 0.9, 0.3, 0.004]]
GAMMAS = [0.0, 0.3, 0.7, 1.0]


def variance(t: Tensor) -> Tensor:
    return (t.cos() * C) ** 2 + (t.sin() * SIGMA_DATA) ** 2


def consistency(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Where the probability-flow ODE through (x, t) ends."""
    return x * C / variance(t).sqrt()


def denoiser(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """The posterior mean."""
    return x * t.cos() * C**2 / variance(t)


def posterior(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """A draw of the data given x."""
    return denoiser(x, t) + C * SIGMA_DATA * t.sin() / variance(t).sqrt() * torch.randn_like(x)


def by_the_data(generator):
    """The jump of a network that knows the data alone: the noise that they imply leads back (CoSIM, eq. 18)."""

    def jump(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        x0 = generator(x, t, labels)
        return diffuse(x0, implied_noise(x, x0, t), s)

    return jump


def run(generator, noise: Tensor, times: list[float], gamma: float, **options) -> Tensor:
    times_ = torch.tensor(times, dtype=torch.float64)
    return gamma_sampler(by_the_data(generator), noise, times=times_, sigma_data=SIGMA_DATA, gamma=gamma, **options)


@pytest.fixture
def noise() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("times", SCHEDULES)
def test_gamma_1_is_multistep_consistency_sampling(noise: Tensor, times: list[float]) -> None:
    draws = torch.randn(len(times), *noise.shape, dtype=torch.float64)
    stream = iter(draws)
    x0 = run(consistency, noise, times, 1.0, randn_like=lambda x: next(stream))
    # In EDM's scale: x = x0 + sigma n, one fresh n a step.
    expected = torch.zeros_like(noise)
    for t, n in zip(times, [noise, *draws], strict=False):
        t = torch.tensor(t, dtype=torch.float64)
        sigma = SIGMA_DATA * t.tan()
        expected = consistency(t.cos() * (expected + sigma * n), t)
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", SCHEDULES)
def test_gamma_0_on_one_point_is_exact(noise: Tensor, times: list[float]) -> None:
    """For data that is one point the denoiser is the consistency function, and the noise is the one we began with."""
    point = torch.full_like(noise, 0.3)
    seen = []
    run(lambda x, t, labels: (seen.append((x, t)), point)[1], noise, times, 0.0)
    for x, t in seen[1:]:
        # The start lies on the circle of the point 0, so the noise implied there is off by cos(T) of the point.
        start = seen[0][1]
        z = (start.sin() * SIGMA_DATA * noise - start.cos() * point) / start.sin()
        torch.testing.assert_close(x, diffuse(point, z, t), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("times", SCHEDULES)
def test_gamma_0_with_a_denoiser_is_ddim(noise: Tensor, times: list[float]) -> None:
    x0 = run(denoiser, noise, times, 0.0)
    x = math.sin(times[0]) * SIGMA_DATA * noise
    for t, s in zip(times, [*times[1:], 0.0], strict=True):
        t, s = torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        F = (t.cos() * x - denoiser(x, t)) / (t.sin() * SIGMA_DATA)
        x = ddim_step(x, F, t, s, SIGMA_DATA)
    torch.testing.assert_close(x0, x, rtol=1e-11, atol=1e-12)


def test_gamma_0_with_a_denoiser_approaches_the_ode_at_first_order(noise: Tensor) -> None:
    start = torch.tensor(1.5, dtype=torch.float64)
    exact = consistency(start.sin() * SIGMA_DATA * noise, start)

    def error(nfe: int) -> float:
        times = [1.5 * (1 - i / nfe) for i in range(nfe)]
        return float((run(denoiser, noise, times, 0.0) - exact).abs().max())

    assert 1.9 < error(200) / error(400) < 2.1


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("times", SCHEDULES)
def test_marginals_are_kept(times: list[float], gamma: float) -> None:
    """A generator that draws from the posterior leaves every x_t, and x0, with the law of the diffused data."""
    torch.manual_seed(1)
    N = 400_000
    seen = []
    start = torch.tensor(times[0], dtype=torch.float64)
    # Begin on the true marginal, which the prior is but for cos(T) of the data.
    noise = torch.randn(N, 1, 1, 1, dtype=torch.float64) * variance(start).sqrt() / (SIGMA_DATA * start.sin())
    x0 = run(lambda x, t, labels: (seen.append((x, t)), posterior(x, t))[1], noise, times, gamma)
    for x, t in [*seen, (x0, torch.tensor(0.0))]:
        assert float(x.var()) == pytest.approx(float(variance(t)), rel=0.012)  # 5 standard errors


@pytest.mark.parametrize("times", SCHEDULES)
def test_gamma_1_with_the_consistency_function_is_exact(times: list[float]) -> None:
    """In closed form: fresh noise alone makes x_s, so only the variance of x0 goes round."""
    t0 = torch.tensor(times[0], dtype=torch.float64)
    var_x = (t0.sin() * SIGMA_DATA) ** 2
    for t, s in zip(times, [*times[1:], None], strict=True):
        t = torch.tensor(t, dtype=torch.float64)
        var_x0 = float(consistency(torch.ones(1, dtype=torch.float64), t)) ** 2 * var_x
        if s is not None:
            s = torch.tensor(s, dtype=torch.float64)
            var_x = s.cos() ** 2 * var_x0 + (s.sin() * SIGMA_DATA) ** 2
    assert float(var_x0) == pytest.approx(C**2, rel=2e-4)  # what is left is the prior's cos(T) c


@pytest.mark.parametrize("gamma", GAMMAS)
def test_batch_size_does_not_matter(noise: Tensor, gamma: float) -> None:
    draws = torch.randn(4, *noise.shape, dtype=torch.float64)

    def part(rows: slice) -> Tensor:
        stream = iter(draws[:, rows])
        return run(consistency, noise[rows], SCHEDULES[2], gamma, randn_like=lambda x: next(stream))

    parts = torch.cat([part(slice(0, 1)), part(slice(1, 3))])
    assert_rounded(part(slice(0, 3)), parts, 20 * len(SCHEDULES[2]))


def test_every_jump_has_the_labels_and_the_last_leads_to_the_data(noise: Tensor) -> None:
    labels, ends = torch.eye(3), []

    def jump(x: Tensor, t: Tensor, s: Tensor, given: Tensor | None) -> Tensor:
        assert given is labels
        ends.append(float(s))
        return x

    times = torch.tensor([1.5, 1.1, 0.4], dtype=torch.float64)
    gamma_sampler(jump, noise, labels, times=times, sigma_data=SIGMA_DATA, gamma=0.6)
    sigmas = [SIGMA_DATA * math.tan(s) for s in ends]
    assert sigmas == pytest.approx([0.8 * SIGMA_DATA * math.tan(1.1), 0.8 * SIGMA_DATA * math.tan(0.4), 0.0])
