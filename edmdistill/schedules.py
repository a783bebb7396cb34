"""Noise levels: training distributions and sampling grids, all in float64.

Both are built on EDM's curve, r in [0, 1]:

    sigma(r) = (sigma_min^(1/rho) + r (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.transfer import Constant
from edmdistill.trigflow import sigma_to_time


def edm_curve(r: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Returns sigma(r), from sigma_min at r = 0 to sigma_max at r = 1.  Source: Karras et al. 2022 (EDM), eq. 5.

    Differs: EDM's index runs the other way.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    base: Tensor = low + r.to(torch.float64) * (high - low)
    return base.pow(rho)


def edm_index(sigma: float, sigma_min: float, sigma_max: float, rho: float = 7.0) -> float:
    """Returns r with sigma(r) = sigma, the inverse of `edm_curve`; in [0, 1] within the range."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return float((sigma ** (1 / rho) - low) / (high - low))


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Returns the grid of EDM's samplers, sigma_max ... sigma_min, without the final 0.  [num_steps]

    Source: EDM, eq. 5.
    """
    if num_steps == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    # EDM's own order of operations, from sigma_max down: golden samples are compared to 1e-9.
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    base: Tensor = high + torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1) * (low - high)
    return base.pow(rho)


def generator_sigmas(nfe: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Returns the default noise levels of a few-step generator, such as 80 and 2.515 for 2 steps.  [nfe]

    Source: CoSIM, section 3.3.  Differs: EDM's grid has sigma_min as its last point; this one ends above it, because
    the last jump goes to 0.
    """
    r = 1 - torch.arange(nfe, dtype=torch.float64) / nfe
    return edm_curve(r, sigma_min, sigma_max, rho)


def curve_through(
    levels: Sequence[float], steps: int, sigma_min: float, sigma_max: float
) -> tuple[Tensor, tuple[int, ...]]:
    """Returns a grid of falling noise levels from sigma_max, without 0, which goes through these; and their indices.

    It is EDM's curve where that goes through them; elsewhere r is linear between two of them.

    Args:
        levels: falling, below sigma_max.
        steps: of the grid and its last step, to 0; more than there are levels.
    Returns: [steps] float64; of sigma_max and of each level.
    """
    r = [1.0, *(edm_index(level, sigma_min, sigma_max) for level in levels)]
    indices = [round((1 - each) * steps) for each in r]
    for i in range(1, len(r)):
        indices[i] = max(indices[i], indices[i - 1] + 1)
    for i in reversed(range(len(r))):  # a step is left for each after it
        indices[i] = min(indices[i], steps - (len(r) - i))
    grid = np.interp(range(steps), [*indices, steps], [*r, 0.0])
    return edm_curve(torch.from_numpy(grid), sigma_min, sigma_max), tuple(indices)


def cosim_sigmas(
    draws: Draws, *, sigma_min: float, sigma_max: float, R: int, share_to_max: float = 0.5, r_s_max: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draws from CoSIM's time schedule pi(s, t) = pi(s) pi(t | s), as noise levels sigma_s <= sigma_t.  [B], [B]

    r_s ~ U[0, r_s_max];  r_t = min(r_s + gamma, 1);  gamma = 1 with probability share_to_max, else U[0, 1] / k with
    k uniform in {1 .. R}: a large R gives more small jumps.
    Source: CoSIM, appendix A.1.  Differs: share_to_max (the paper's 1/2) and r_s_max (the paper's 1) are arguments.
    """
    r_s = draws.uniform() * r_s_max
    k = (draws.uniform() * R).floor() + 1
    to_max = draws.uniform() < share_to_max
    gamma = (draws.uniform() / k).masked_fill(to_max, 1.0)
    r_t = (r_s + gamma).clamp(max=1)
    return edm_curve(r_s, sigma_min, sigma_max), edm_curve(r_t, sigma_min, sigma_max)


def start_first_sigmas(
    draws: Draws, *, sigma_min: float, sigma_max: float, share_to_max: float = 0.5, sigma_from: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draws where jumps start before where they are compared, as noise levels sigma_s <= sigma_t.  [B], [B]

    r_t = 1 with probability share_to_max, else U[r(sigma_from), 1];  r_s = r_t (U[0, 1] + U[0, 1]) / 2

    Args:
        sigma_from: lowest level that a jump starts from, below sigma_max; 0 = sigma_min.
    Differs: from `cosim_sigmas`, where s comes first, so that few jumps start in the middle; and the two uniform
        numbers spare the ends of [0, t], where the two scores say little of a jump.
    """
    low = edm_index(sigma_from, sigma_min, sigma_max) if sigma_from > sigma_min else 0.0
    from_max = draws.uniform() < share_to_max
    r_t = (low + (1 - low) * draws.uniform()).masked_fill(from_max, 1.0)
    r_s = r_t * (draws.uniform() + draws.uniform()) / 2
    return edm_curve(r_s, sigma_min, sigma_max), edm_curve(r_t, sigma_min, sigma_max)


def ctm_indices(
    draws: Draws,
    N: int,
    *,
    max_steps: int,
    sampling: Literal["official", "paper"] = "official",
    matching: Literal["soft", "local", "global"] = "soft",
    one_step_share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draws CTM's times t, s and the solver's end u as indices of a grid 0 ... N - 1 from noise to data.

    t ~ U{0 .. N-1-k}, s ~ U{t+k .. N-1}. "official": k is shared by the batch, with P(k) ~ k up to max_steps, and soft
    matching has u = t + k. "paper": k = 1, and u ~ U{t+1 .. s}, at most max_steps from t.

    Args:
        max_steps: largest number of solver steps.
        matching: "local": u = t + 1; "global": u = s, or as close to it as max_steps allows.
        one_step_share: share of jumps from the first point to the last.
    Returns: t, s, u [B] int64 with t < u <= s, and a number of solver steps that suffices for all rows.
    Source: Kim et al. 2024 (CTM), appendix D.1 and figure 3; their code for "official".  Differs: with max_steps below
        N - 1 their code hardly ever draws the jump from noise to data; one_step_share does.
    """
    max_steps = min(max_steps, N - 1)
    k = 1
    if sampling == "official":
        k = min(max_steps, math.ceil((math.sqrt(1 + 4 * draws.common() * max_steps * (max_steps + 1)) - 1) / 2) or 1)
    t = (draws.uniform() * (N - k)).long()
    s = t + k + (draws.uniform() * (N - k - t)).long()
    one_step = draws.uniform() < one_step_share
    t, s = t.masked_fill(one_step, 0), s.masked_fill(one_step, N - 1)
    reach = torch.minimum(s, t + max_steps)
    if matching == "local":
        return t, s, t + 1, 1
    if matching == "global":
        return t, s, reach, max_steps
    if sampling == "official":
        return t, s, t + k, k
    return t, s, t + 1 + (draws.uniform() * (reach - t)).long(), max_steps


def ctm_score_sigmas(draws: Draws, sigma_min: float, sigma_max: float) -> Tensor:
    """Draws the noise levels of CTM's denoising loss.  [B]

    One half follows EDM, ln(sigma) ~ N(-1.2, 1.2^2); the other half is uniform on the upper .7 of EDM's curve, so that
    high noise levels are not neglected.  Source: CTM, appendix D.1.
    """
    lognormal = lognormal_sigmas(draws, P_mean=-1.2, P_std=1.2)
    high = edm_curve(1 - 0.7 * draws.uniform(), sigma_min, sigma_max)
    return torch.where(draws.uniform() < 0.5, lognormal, high)


def lognormal_sigmas(draws: Draws, *, P_mean: float, P_std: float) -> Tensor:
    """Draws ln(sigma) ~ N(P_mean, P_std^2) and returns sigma.  [B]  Source: EDM, table 1 ("noise distribution")."""
    return (draws.normal() * P_std + P_mean).exp()


def neighbor_sigmas(
    draws: Draws, intervals: int, sigma_min: float, sigma_max: float, *, P_mean: float, P_std: float
) -> tuple[Tensor, Tensor]:
    """Draws two neighbors sigma_t > sigma_r of EDM's grid, with 0 as its lowest level, and returns them.  [B] each

    A pair's probability is that of ln(sigma) ~ N(P_mean, P_std^2) between its levels.
    Source: Song & Dhariwal 2023 (iCT), eq. 10; sCM, appendix E.2.
    """
    grid = _neighbors(intervals, sigma_min, sigma_max, P_mean, P_std).on(draws.device)
    below = torch.searchsorted(grid[1, 1:].contiguous(), draws.uniform()).clamp(max=intervals - 1)
    return grid[0, below + 1], grid[0, below]


@cache
def _neighbors(intervals: int, sigma_min: float, sigma_max: float, P_mean: float, P_std: float) -> Constant:
    """Returns the levels 0 ... sigma_max, and the probability of all below each.  [2,intervals+1] float64"""
    sigmas = edm_curve(torch.arange(1, intervals + 1, dtype=torch.float64) / intervals, sigma_min, sigma_max)
    probabilities = discrete_lognormal(sigmas, P_mean=P_mean, P_std=P_std)
    zero = torch.zeros(1, dtype=torch.float64)
    return Constant(torch.stack([torch.cat([zero, sigmas]), torch.cat([zero, probabilities.cumsum(0)])]))


def student_sigmas(draws: Draws, *, P_mean: float, P_std: float, degrees: float, low: float, high: float) -> Tensor:
    """Draws ln(sigma) = P_mean + P_std T, T of Student's t distribution, between two levels, and returns sigma.  [B]

    Args:
        degrees: of freedom; few make heavy tails.
        low, high: noise levels.
    Source: Lee et al. 2025 (TCM), log-Student-t.  Differs: quantiles are interpolated between 4,097 exact ones, so that
        they can be drawn on every device; with the paper's .01 degrees, within 1e-5 of ln(sigma). Of a light tail the
        last 1/4096 is spread from its last quantile to the end of the range.
    """
    quantiles = _student_quantiles(P_mean, P_std, degrees, low, high).on(draws.device)
    place = draws.uniform() * (len(quantiles) - 1)
    below = place.long()
    return quantiles[below].lerp(quantiles[below + 1], place - below).exp()


@cache
def _student_quantiles(P_mean: float, P_std: float, degrees: float, low: float, high: float) -> Constant:
    """Returns ln(sigma) from low to high at 4,097 equal steps of probability.  float64"""
    from scipy import special  # its import is slow, and TCM alone needs it

    ends = (torch.tensor([low, high], dtype=torch.float64).log() - P_mean) / P_std
    first, last = special.stdtr(degrees, ends.numpy())
    T = torch.from_numpy(special.stdtrit(degrees, torch.linspace(first, last, 4097, dtype=torch.float64).numpy()))
    return Constant(P_mean + P_std * T.clamp(*ends.tolist()))


def lognormal_times(draws: Draws, sigma_data: float, *, P_mean: float, P_std: float) -> Tensor:
    """Draws ln(sigma) ~ N(P_mean, P_std^2) and returns t = arctan(sigma / sigma_d).  [B]  Source: sCM, section 3."""
    return sigma_to_time(lognormal_sigmas(draws, P_mean=P_mean, P_std=P_std), sigma_data)


def curve_times(
    draws: Draws, sigma_data: float, sigma_min: float, sigma_max: float, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draws noise levels uniformly on EDM's curve, r ~ U[low, high], and returns t = arctan(sigma / sigma_d).  [B]"""
    r = low + (high - low) * draws.uniform()
    return sigma_to_time(edm_curve(r, sigma_min, sigma_max), sigma_data)


def interval_times(
    draws: Draws, t_max: float, *, P_mean: float, P_std: float, share_to_data: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draws pairs t > s of a flow map, and returns t in (0, t_max] and the length d = t - s in (0, t].  [B] each

    The length is a fraction of t_max: d = sigmoid(a) t_max with a ~ N(P_mean, P_std^2), and s ~ U[0, t_max - d]. A
    share of the jumps leads to the data: they keep their t, and s is 0.
    Source: Sabour et al. 2025 (Align Your Flow).  Differs: the interval is an angle on the circle, where the
        paper's is a linear time; share_to_data is ours.
    """
    d = (draws.normal() * P_std + P_mean).sigmoid() * t_max
    t = d + draws.uniform() * (t_max - d)
    return t, torch.where(draws.uniform() < share_to_data, t, d)


def lognormal_pairs(
    draws: Draws,
    sigma_data: float,
    t_max: float,
    *,
    P_mean: float,
    P_std: float,
    P_mean_s: float | None = None,
    P_std_s: float | None = None,
    share_to_data: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draws t and s < t of a flow map as two independent times, and returns t and the length d = t - s.  [B] each

    One has ln(sigma) ~ N(P_mean, P_std^2), the other N(P_mean_s, P_std_s^2), None being P_mean and P_std, up to t_max;
    t is the larger one. share_to_data: see `interval_times`. Short jumps are common, without which the errors of
    Eulerian tangents grow.
    Source: Geng et al. 2025 (MeanFlow), for CIFAR-10, and their code: two logit-normal times, which are these noise
        levels.
    """
    laws = (P_mean, P_std), (P_mean if P_mean_s is None else P_mean_s, P_std if P_std_s is None else P_std_s)
    times = [lognormal_times(draws, sigma_data, P_mean=mean, P_std=std).clamp(max=t_max) for mean, std in laws]
    t, s = torch.maximum(*times), torch.minimum(*times)
    return t, torch.where(draws.uniform() < share_to_data, t, t - s)


def discrete_lognormal(sigmas: Tensor, *, P_mean: float, P_std: float) -> Tensor:
    """Returns the probabilities of increasing noise levels when ln(sigma) ~ N(P_mean, P_std^2) is discretized.

    A level has the probability of the interval from the level below; the first, that of everything below it.
    Returns: probabilities of sum 1.  [N] float64
    Source: Song & Dhariwal 2023 (iCT), eq. 10; sCM, appendix E.2.
    """
    below = torch.special.ndtr((sigmas.log() - P_mean) / P_std)
    probabilities = torch.cat([below[:1], below.diff()])
    return probabilities / probabilities.sum()
