"""Gamma-sampling by networks that know whole trajectories, CTM's, against closed forms; float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.sampling.generate import sample
from edmdistill.sampling.heun import EDM2_SAMPLER, Churn, edm_sampler
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.schedules import generator_sigmas
from edmdistill.trigflow import sigma_to_time

SD, MEAN, STD = 0.5, 0.2, 0.8
GAMMAS = [n / 20 for n in range(21)]
STEPS = 1, 2, 4, 18, 40


def schedule(nfe: int) -> Tensor:
    return sigma_to_time(generator_sigmas(nfe, 0.002, 80.0), SD)


def spread(t: Tensor) -> Tensor:
    return ((t.cos() * STD) ** 2 + (t.sin() * SD) ** 2).sqrt()


def jump(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
    """Of N(MEAN, STD^2): m + (x - m) sqrt((s^2 + v) / (t^2 + v)) in EDM's scale."""
    return s.cos() * MEAN + (x - t.cos() * MEAN) * spread(s) / spread(t)


def run(jump, noise: Tensor, times: Tensor, gamma: float, **options) -> Tensor:
    return gamma_sampler(jump, noise, times=times, sigma_data=SD, gamma=gamma, **options)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_marginals_are_kept(gamma: float, nfe: int) -> None:
    """Of a linear sampler: x0 = a + sum_i w_i z_i, so its law is read from where 0 and unit draws lead."""
    times = schedule(nfe)
    start = times[0]
    draws = torch.zeros(nfe, nfe, 1, 1, 1, dtype=torch.float64)  # row i draws 1 at step i, and row 0 nothing
    draws[torch.arange(nfe), torch.arange(nfe)] = 1
    at = iter(range(1, nfe))
    # From the diffused data's own law at the start, which the prior is but for cos(T).
    first = torch.zeros(nfe, 1, 1, 1, dtype=torch.float64) + start.cos() * MEAN / (SD * start.sin())
    x0 = run(jump, first, times, gamma, randn_like=lambda x: draws[:, next(at)])
    from_start = run(jump, first[:1] + 1, times, gamma, randn_like=torch.zeros_like) - x0[:1]
    by_start = from_start.flatten() * spread(start) / (SD * start.sin())
    variance = by_start**2 + (x0[1:] - x0[0]).square().sum()
    torch.testing.assert_close(x0[0].flatten(), torch.full((1,), MEAN, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, torch.full((1,), STD**2, dtype=torch.float64), rtol=1e-11, atol=0)


def test_gamma_0_is_one_trajectory_however_it_is_cut() -> None:
    torch.manual_seed(0)
    noise = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    end = run(jump, noise, schedule(1), 0.0)
    for times in (schedule(4), schedule(40), torch.tensor([schedule(1)[0], 1.2, 1.2, 0.3], dtype=torch.float64)):
        torch.testing.assert_close(run(jump, noise, times, 0.0), end, rtol=1e-11, atol=1e-12)


def test_gamma_1_is_multistep_consistency_sampling() -> None:
    """Path by path: only jumps to the data are asked for, and each is diffused by the same fresh noise."""
    torch.manual_seed(0)
    times, draws = schedule(4), torch.randn(4, 3, 1, 2, 2, dtype=torch.float64)
    stream = iter(draws[1:])
    asked: list[float] = []

    def seen(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(float(s))
        return jump(x, t, s)

    x0 = run(seen, draws[0], times, 1.0, randn_like=lambda x: next(stream))
    expected = torch.zeros_like(x0)
    for t, n in zip(times, draws, strict=True):
        expected = jump(t.cos() * expected + t.sin() * SD * n, t, torch.zeros_like(t))
    assert asked == [0.0] * 4
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-13)


# Three modes on a line: the trajectory through x at t is where the distribution function stays, F_s^-1(F_t(x)).
SHARES, MEANS, STDS = np.array([0.5, 0.3, 0.2]), np.array([-0.7, 0.1, 0.9]), np.array([0.08, 0.15, 0.1])


def distribution(x: np.ndarray, t: float) -> np.ndarray:
    scale = np.sqrt((math.cos(t) * STDS) ** 2 + (math.sin(t) * SD) ** 2)
    z = (x[..., None] - math.cos(t) * MEANS) / scale
    return (SHARES * torch.special.ndtr(torch.from_numpy(z)).numpy()).sum(-1)


def mixture_jump(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    level = distribution(x.flatten().numpy(), float(t))
    low, high = np.full_like(level, -6.0), np.full_like(level, 6.0)
    for _ in range(45):
        middle = (low + high) / 2
        below = distribution(middle, float(s)) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return torch.from_numpy((low + high) / 2).reshape(x.shape)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_three_modes_are_drawn_as_they_are(gamma: float) -> None:
    torch.manual_seed(0)
    noise = torch.randn(4000, 1, 1, 1, dtype=torch.float64)
    x0 = run(mixture_jump, noise, schedule(4), gamma).flatten().numpy()
    assert kstest(x0, lambda x: distribution(x, 0.0)).pvalue > 0.01


def test_a_mutant_that_jumps_to_the_data_fails_there() -> None:
    def by_the_data(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        x0 = mixture_jump(x, t, torch.zeros_like(t), None)
        return s.cos() * x0 + s.sin() / t.sin() * (x - t.cos() * x0)

    torch.manual_seed(0)
    x0 = run(by_the_data, torch.randn(4000, 1, 1, 1, dtype=torch.float64), schedule(4), 0.0).flatten().numpy()
    assert kstest(x0, lambda x: distribution(x, 0.0)).pvalue < 1e-6


@pytest.fixture
def generator() -> Generator:
    """A tiny one of two times, both of which matter."""
    torch.manual_seed(0)
    network = UNet(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    with torch.no_grad():
        network.out_gain.fill_(0.5)
    flow = add_second_time(FlowNetwork(network, EDM()))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    config = CheckpointConfig(stage="generator", method="ctm", provenance=Provenance(source="a test"), **describe(flow))
    return Generator(flow, config)


def test_a_generator_of_two_times_is_asked_where_to(generator: Generator) -> None:
    torch.manual_seed(1)
    x, t, s = torch.randn(2, 1, 8, 8), torch.tensor([1.2, 0.7]), torch.tensor([0.4, 0.7])
    with torch.no_grad():
        assert not torch.equal(generator.flow(x, t, None, s), generator.flow(x, t, None, 0 * s))
        landed = generator.jump(x, t, s)
        assert torch.equal(landed[1], x[1])
        assert torch.equal(generator(x, t), generator.jump(x, t, 0 * t))


def test_the_score_is_read_at_equal_times(generator: Generator) -> None:
    """sample --solver heun is Heun's method on g(x, t, t)."""
    torch.manual_seed(1)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 0.2])
    t = sigma_to_time(sigma, SD)
    with torch.no_grad():
        x_t = (t.cos().reshape(2, 1, 1, 1) * x).float()
        F = generator.flow(x_t, t, None, t)
        expected = t.cos().reshape(2, 1, 1, 1) * x_t - t.sin().reshape(2, 1, 1, 1) * SD * F
    torch.testing.assert_close(Denoiser(generator.flow)(x, sigma), expected.float(), rtol=1e-4, atol=1e-5)
    noise = SeededNoise([3]).normal((1, 8, 8))
    with torch.no_grad():
        denoiser = Denoiser(generator.flow)
        own = edm_sampler(denoiser, noise, sigmas=EDM2_SAMPLER.sigmas(denoiser, 4)).clamp(-1, 1)
    assert torch.equal(sample(generator, 7, seeds=[3], solver="heun"), own)
    one = Generator(drop_second_time(generator.flow), generator.config)
    with pytest.raises(EdmDistillError, match="for teachers and for generators that read two times, such as CTM's"):
        sample(one, 7, seeds=[3], solver="heun")
    with pytest.raises(EdmDistillError, match="guide and churn belong to a teacher's solver: name a solver too"):
        sample(generator, 7, seeds=[3], churn=Churn(5.0))
    with pytest.raises(
        EdmDistillError, match="gamma is for a generator's jumps, and the solver heun makes none: leave out one"
    ):
        sample(generator, 7, seeds=[3], solver="heun", gamma=0.5)
