"""Noise levels: what training draws and what sampling visits. Everything here is float64.

EDM's curve runs through both, r in [0, 1]:

    sigma(r) = (sigma_min^(1/rho) + r (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from edmdistill.draws import Draws


def edm_curve(r: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """sigma(r): r = 0 is sigma_min, r = 1 is sigma_max.  Source: Karras et al. 2022 (EDM), eq. 5; r runs upwards."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    base: Tensor = low + r.to(torch.float64) * (high - low)
    return base.pow(rho)


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """The grid of EDM's samplers, sigma_max ... sigma_min, without the closing 0.  [num_steps]  Source: EDM, eq. 5."""
    if num_steps == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    # EDM's own order of operations, from sigma_max down: golden samples are compared with to 1e-9.
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    base: Tensor = high + torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1) * (low - high)
    return base.pow(rho)


def generator_sigmas(nfe: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of a few-step generator before tuning, t_i with i < k of k steps: 2 steps are 80 and 2.515.  [nfe]

    Source: CoSIM, section 3.3.  Differs: EDM's own grid spends its last point on sigma_min; this one ends above it,
    for the last jump leads to 0.
    """
    r = 1 - torch.arange(nfe, dtype=torch.float64) / nfe
    return edm_curve(r, sigma_min, sigma_max, rho)


def cosim_sigmas(
    draws: Draws,
    *,
    sigma_min: float,
    sigma_max: float,
    R: int,
    share_to_max: float = 0.5,
    r_s_max: float = 1.0,
    rho: float = 7.0,
) -> tuple[Tensor, Tensor]:
    """CoSIM's time schedule pi(s, t) = pi(s) pi(t | s), as noise levels sigma_s <= sigma_t.  [B], [B]

    r_s ~ U[0, r_s_max];  r_t = min(r_s + gamma, 1);  gamma = 1 with probability share_to_max, else U[0, 1] / k with
    k uniform in {1 .. R}: large R asks for more small jumps.
    Source: CoSIM, appendix A.1.  Differs: share_to_max (the paper's 1/2) and r_s_max (the paper's 1) are arguments.
    """
    r_s = draws.uniform() * r_s_max
    k = (draws.uniform() * R).floor() + 1
    gamma = torch.where(draws.uniform() < share_to_max, 1.0, draws.uniform() / k)
    r_t = (r_s + gamma).clamp(max=1)
    return edm_curve(r_s, sigma_min, sigma_max, rho), edm_curve(r_t, sigma_min, sigma_max, rho)


def ctm_indices(
    draws: Draws,
    N: int,
    *,
    most: int,
    sampling: Literal["official", "paper"] = "official",
    matching: Literal["soft", "local", "global"] = "soft",
    one_step_share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Where CTM's training jumps from, to, and how far the teacher leads, on a grid 0 ... N - 1 from noise to data.

    t ~ U{0 .. N-1-k}, s ~ U{t+k .. N-1}. "official": k is common to the batch, with P(k) ~ k up to `most`, and soft
    matching has u = t + k. "paper": k = 1, and u ~ U{t+1 .. s}, `most` steps from t at most.

    Args:
        most: steps of the teacher, at most.
        matching: "local": u = t + 1; "global": u = s, or as near to it as `most` allows.
        one_step_share: of the jumps that lead from the first point to the last.
    Returns: t, s, u [B] int64 with t < u <= s, and a number of steps that is enough for all of them.
    Source: Kim et al. 2024 (CTM), appendix D.1 and figure 3; their code for "official".  Differs: with `most` below
        N - 1 their code hardly ever draws the jump from noise to data; one_step_share does.
    """
    most = min(most, N - 1)
    k = 1
    if sampling == "official":
        k = min(most, math.ceil((math.sqrt(1 + 4 * draws.common() * most * (most + 1)) - 1) / 2) or 1)
    t = (draws.uniform() * (N - k)).long()
    s = t + k + (draws.uniform() * (N - k - t)).long()
    one_step = draws.uniform() < one_step_share
    t, s = t.masked_fill(one_step, 0), s.masked_fill(one_step, N - 1)
    reach = torch.minimum(s, t + most)
    if matching == "local":
        return t, s, t + 1, 1
    if matching == "global":
        return t, s, reach, most
    if sampling == "official":
        return t, s, t + k, k
    return t, s, t + 1 + (draws.uniform() * (reach - t)).long(), most


def ctm_score_sigmas(draws: Draws, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels of CTM's denoising loss: one half EDM's, ln(sigma) ~ N(-1.2, 1.2^2), one half the upper .7 of EDM's
    curve, so that large ones are not forgotten.  [B]  Source: CTM, appendix D.1."""
    usual = lognormal_sigmas(draws, P_mean=-1.2, P_std=1.2)
    high = edm_curve(1 - 0.7 * draws.uniform(), sigma_min, sigma_max)
    return torch.where(draws.uniform() < 0.5, usual, high)


def lognormal_sigmas(draws: Draws, *, P_mean: float, P_std: float) -> Tensor:
    """ln(sigma) ~ N(P_mean, P_std^2).  [B]  Source: EDM, table 1 ("noise distribution")."""
    return (draws.normal() * P_std + P_mean).exp()


def lognormal_shares(sigmas: Tensor, *, P_mean: float, P_std: float) -> Tensor:
    """The law ln(sigma) ~ N(P_mean, P_std^2) split among rising noise levels: what lies between one and the one before.

    Returns: shares of sum 1; the first has all that lies below it.  [N] float64
    Source: Song & Dhariwal 2023 (iCT), eq. 10; sCM, appendix E.2.
    """
    below = torch.special.ndtr((sigmas.log() - P_mean) / P_std)
    shares = torch.cat([below[:1], below.diff()])
    return shares / shares.sum()
