"""Sampling grids against known numbers, training distributions against their probabilities."""

import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch

from edmdistill.draws import Draws
from edmdistill.schedules import (
    cosim_sigmas,
    ctm_indices,
    ctm_score_sigmas,
    curve_through,
    curve_times,
    edm_curve,
    edm_index,
    edm_sigmas,
    generator_sigmas,
    lognormal_pairs,
    lognormal_sigmas,
    lognormal_times,
    neighbor_sigmas,
    start_first_sigmas,
    student_sigmas,
)

MIN, MAX = 0.002, 80.0


def draw(n: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    return cosim_sigmas(Draws(0, n), sigma_min=MIN, sigma_max=MAX, **{"R": 4, **options})


def test_edm_grid() -> None:
    grid = edm_sigmas(18, MIN, MAX)
    assert grid.dtype == torch.float64
    # Karras et al., 18 steps: the first levels below 80.
    assert grid[:3].tolist() == pytest.approx([80.0, 57.586, 40.786], abs=1e-3)
    assert grid[-1] == pytest.approx(MIN)
    assert bool((grid.diff() < 0).all())
    assert edm_sigmas(1, MIN, MAX).tolist() == [MAX]


def test_edm_grid_lies_on_the_curve() -> None:
    torch.testing.assert_close(edm_sigmas(9, MIN, MAX), edm_curve(torch.linspace(1, 0, 9), MIN, MAX), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", [(), (2.5152192,), (17.5278, 2.5152192, 0.169752)])
def test_a_curve_through_levels_of_edms_curve_is_that_curve(levels: tuple[float, ...]) -> None:
    grid, indices = curve_through(levels, 8, MIN, MAX)
    torch.testing.assert_close(grid, generator_sigmas(8, MIN, MAX), rtol=1e-4, atol=0)
    assert indices == tuple(range(0, 8, 8 // (1 + len(levels))))


@pytest.mark.parametrize(
    ("levels", "steps"), [((0.3,), 8), ((70.0, 60.0, 50.0), 4), ((0.003, 0.0025), 16), ((79.9,), 2)]
)
def test_a_curve_falls_through_all_levels_and_has_its_steps(levels: tuple[float, ...], steps: int) -> None:
    """However near one another they are, or the ends of the range."""
    grid, indices = curve_through(levels, steps, MIN, MAX)
    assert (len(grid), grid.dtype) == (steps, torch.float64)
    assert grid[list(indices)].tolist() == pytest.approx([MAX, *levels])
    assert bool((grid.diff() < 0).all())


def test_rho_bends_every_curve() -> None:
    """With rho = 1 levels are at equal distances."""
    ends = {"sigma_min": 1.0, "sigma_max": 5.0, "rho": 1.0}
    assert edm_sigmas(5, **ends).tolist() == pytest.approx([5, 4, 3, 2, 1])
    assert generator_sigmas(4, **ends).tolist() == pytest.approx([5, 4, 3, 2])
    assert edm_index(2.0, **ends) == pytest.approx(0.25)
    assert edm_curve(torch.tensor(0.25), **ends) == pytest.approx(2)


def test_curves_are_float64_whatever_comes_in() -> None:
    assert edm_curve(torch.tensor(0.3), MIN, MAX).dtype == torch.float64


def test_neighbors_lie_on_the_grid_of_the_range_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    law = {"P_mean": -1.1, "P_std": 2.0}
    for N in range(1, 40):
        for drawn in (0.0, 1 - 2**-53):  # probabilities add up to 1 but for rounding
            monkeypatch.setattr(Draws, "uniform", lambda self, drawn=drawn: torch.tensor([drawn]).double())
            t, r = neighbor_sigmas(Draws(0, 1), N, 0.02, 8.0, **law)
            last = N - 1 if drawn else 0
            ends = edm_curve(torch.tensor([last + 1.0, last], dtype=torch.float64) / N, 0.02, 8.0)
            torch.testing.assert_close(torch.cat([t, r]), ends if last else ends * torch.tensor([1.0, 0.0]))


def test_student_sigmas_of_a_law_far_within_the_range() -> None:
    """At its ends, probabilities are 0 and 1, and quantiles infinite."""
    sigmas = student_sigmas(Draws(0, 20000), P_mean=0.0, P_std=0.05, degrees=1e6, low=MIN, high=MAX)
    assert MIN <= sigmas.min() <= sigmas.max() <= MAX
    assert float(sigmas.log().quantile(0.84)) == pytest.approx(0.05, rel=0.05)


def test_a_share_of_pairs_leads_to_the_data() -> None:
    law = {"sigma_data": 0.5, "t_max": 1.5, "P_mean": -1.0, "P_std": 1.4}
    t, d = lognormal_pairs(Draws(0, 20000), **law, share_to_data=0.25)
    t_before, d_before = lognormal_pairs(Draws(0, 20000), **law)
    to_data = d == t
    assert float(to_data.double().mean()) == pytest.approx(0.25, abs=0.015)
    assert torch.equal(t, t_before)
    assert torch.equal(d[~to_data], d_before[~to_data])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_times_are_those_of_the_levels(sigma_data: float) -> None:
    r = Draws(0, 1000).uniform()
    expected = (edm_curve(0.2 + 0.5 * r, MIN, MAX) / sigma_data).atan()
    torch.testing.assert_close(curve_times(Draws(0, 1000), sigma_data, MIN, MAX, low=0.2, high=0.7), expected)
    levels = {"P_mean": -1.2, "P_std": 1.4}
    expected = (lognormal_sigmas(Draws(0, 1000), **levels) / sigma_data).atan()
    torch.testing.assert_close(lognormal_times(Draws(0, 1000), sigma_data, **levels), expected)


def test_generator_grids() -> None:
    assert generator_sigmas(1, MIN, MAX).tolist() == pytest.approx([80])
    assert generator_sigmas(2, MIN, MAX).tolist() == pytest.approx([80, 2.515], abs=1e-3)
    assert generator_sigmas(3, MIN, MAX).tolist() == pytest.approx([80, 9.72, 0.470], abs=5e-3)


def test_curve_ends() -> None:
    ends = edm_curve(torch.tensor([0.0, 1.0]), MIN, MAX)
    assert ends.tolist() == pytest.approx([MIN, MAX])


def test_cosim_times_are_ordered_and_in_range() -> None:
    s, t = draw(10_000)
    assert s.dtype == t.dtype == torch.float64
    assert bool((s <= t).all())
    assert MIN * 0.999 <= s.min() <= t.max() <= MAX * 1.001


# P(t = sigma_max) = share + (1 - share) mean over k of P(r_s + u/k >= 1), and that is 1/(2k).
@pytest.mark.parametrize(
    ("R", "share", "probability"), [(4, 0.5, 0.630), (8, 0.5, 0.585), (4, 0.0, 0.260), (1, 1.0, 1.0)]
)
def test_how_often_t_is_sigma_max(R: int, share: float, probability: float) -> None:
    n = 100_000
    _, t = draw(n, R=R, share_to_max=share)
    exact = share + (1 - share) * sum(1 / (2 * k) for k in range(1, R + 1)) / R
    assert exact == pytest.approx(probability, abs=6e-4)
    frequency = (t > MAX * (1 - 1e-9)).double().mean()
    assert abs(frequency - exact) <= 4 * math.sqrt(exact * (1 - exact) / n)


def test_s_ends_at_r_s_max() -> None:
    s, _ = draw(10_000, r_s_max=0.8)
    end = edm_curve(torch.tensor(0.8), MIN, MAX)
    assert 0.9 * end <= s.max() <= end
    _, t = draw(100_000, r_s_max=0.3, R=1, share_to_max=0.0)  # a jump is as long as ever: P(r_s + U[0, 1] > 1) = E r_s
    assert (t > MAX * (1 - 1e-9)).double().mean() == pytest.approx(0.15, abs=0.005)


def test_s_is_uniform_along_the_curve() -> None:
    s, _ = draw(100_000)
    below = (s < edm_curve(torch.tensor(0.25), MIN, MAX)).double().mean()
    assert below == pytest.approx(0.25, abs=0.006)


def test_lognormal() -> None:
    log = lognormal_sigmas(Draws(0, 100_000), P_mean=-1.2, P_std=1.2).log()
    assert log.mean() == pytest.approx(-1.2, abs=0.02)
    assert log.std() == pytest.approx(1.2, abs=0.02)


def test_levels_are_a_function_of_the_draws() -> None:
    torch.testing.assert_close(draw(100), draw(100), rtol=0, atol=0)


def test_edm_index_inverts_the_curve() -> None:
    r = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert [edm_index(float(sigma), MIN, MAX) for sigma in edm_curve(r, MIN, MAX)] == pytest.approx(r.tolist())


def test_start_first_sigmas() -> None:
    """t: the share at sigma_max, and uniform on the curve above the lowest level; s/t on the curve has mean 1/2."""
    n = 20000
    s, t = start_first_sigmas(Draws(0, n), sigma_min=MIN, sigma_max=MAX, share_to_max=0.3, sigma_from=0.3)
    r_s, r_t = (((level ** (1 / 7) - MIN ** (1 / 7)) / (MAX ** (1 / 7) - MIN ** (1 / 7))) for level in (s, t))
    assert (r_s <= r_t).all()
    top = t > MAX - 1e-9
    assert float(top.double().mean()) == pytest.approx(0.3, abs=0.01)
    low = edm_index(0.3, MIN, MAX)
    assert float(r_t[~top].min()) == pytest.approx(low, abs=1e-3)
    assert float(r_t[~top].mean()) == pytest.approx((1 + low) / 2, abs=0.01)
    ratio = r_s / r_t
    assert float(ratio.mean()) == pytest.approx(1 / 2, abs=0.01)
    assert float(ratio.var()) == pytest.approx(1 / 24, abs=0.002), "of the mean of two uniform numbers"
    _, below_all = start_first_sigmas(Draws(0, n), sigma_min=MIN, sigma_max=MAX, share_to_max=0.3, sigma_from=MIN / 10)
    _, from_all = start_first_sigmas(Draws(0, n), sigma_min=MIN, sigma_max=MAX, share_to_max=0.3)
    assert torch.equal(below_all, from_all)


@pytest.mark.parametrize("most", [5, 17])
@pytest.mark.parametrize("sampling", ["official", "paper"])
@pytest.mark.parametrize("matching", ["soft", "local", "global"])
def test_indices(sampling: str, matching: str, most: int) -> None:
    size, shares = 2000, []
    for seed in range(20):
        t, s, u, steps = ctm_indices(
            Draws(seed, size), 18, max_steps=most, sampling=sampling, matching=matching, one_step_share=0.1
        )
        assert ((t >= 0) & (t < u) & (u <= s) & (s <= 17)).all()
        assert ((u - t) <= steps).all()
        assert steps <= most
        if matching == "local":
            assert (u == t + 1).all()
        if matching == "global":
            assert (u == torch.minimum(s, t + most)).all()
        if matching == "soft" and sampling == "official":
            assert (u == t + steps).all()
        shares.append(((t == 0) & (s == 17)).double().mean())
    assert 0.09 < torch.stack(shares).mean() < (0.2 if most == 5 else 0.6)  # a k of 17 is the whole way for all


@pytest.mark.parametrize("most", [2, 9])
@pytest.mark.parametrize("sampling", ["official", "paper"])
def test_every_jump_has_its_probability(sampling: str, most: int) -> None:
    N, n = 5, 50_000
    t, s, u, steps = ctm_indices(Draws(0, n), N, max_steps=most, sampling=sampling)
    assert steps <= N - 1
    k = steps if sampling == "official" else 1
    law = {}
    for start in range(N - k):
        for end in range(start + k, N):
            stops = range(start + 1, min(end, start + most) + 1) if sampling == "paper" else [start + k]
            for stop in stops:
                law[start, end, stop] = 1 / (N - k) / (N - k - start) / len(stops)
    found = Counter(zip(t.tolist(), s.tolist(), u.tolist(), strict=True))
    assert found.keys() == law.keys()
    assert {jump: count / n for jump, count in found.items()} == pytest.approx(law, abs=0.008)


@pytest.mark.parametrize(("drawn", "steps"), [(0.0, 1), (1 / 153 - 1e-9, 1), (1 / 153 + 1e-9, 2), (1 - 1e-12, 17)])
def test_the_number_of_steps_at_the_ends_of_its_law(drawn: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at least 1 and at most 17; 1 has one part in 1 + 2 + ... + 17 = 153."""
    monkeypatch.setattr(Draws, "common", lambda self: drawn)
    t, s, u, found = ctm_indices(Draws(0, 1000), 18, max_steps=100)
    assert found == steps
    assert ((t < u) & (u <= s) & (s <= 17)).all()


def test_half_of_ctms_denoising_is_edms_and_half_at_high_noise() -> None:
    sigmas = ctm_score_sigmas(Draws(0, 100_000), MIN, MAX)
    for sigma in (0.05, 0.2, 0.5, 2.0, 8.0, 40.0):
        lognormal = NormalDist(-1.2, 1.2).cdf(math.log(sigma))
        high = min(max((edm_index(sigma, MIN, MAX) - 0.3) / 0.7, 0.0), 1.0)
        assert (sigmas <= sigma).double().mean() == pytest.approx((lognormal + high) / 2, abs=0.006)


def test_k_is_shared_by_the_batch_and_has_probability_proportional_to_it() -> None:
    counts = torch.zeros(18, dtype=torch.float64)
    for seed in range(3000):
        whole_batch = ctm_indices(Draws(seed, 4), 18, max_steps=17)[3]
        if seed < 300:
            assert whole_batch == ctm_indices(Draws(seed, 4, slice(2, 4)), 18, max_steps=17)[3]
        counts[whole_batch] += 1
    k = torch.arange(18, dtype=torch.float64)
    torch.testing.assert_close(counts / 3000, k / k.sum(), rtol=0, atol=0.02)
