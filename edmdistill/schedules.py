"""Noise levels: what training draws and what sampling visits. Everything here is float64.

EDM's curve runs through both, r in [0, 1]:

    sigma(r) = (sigma_min^(1/rho) + r (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
"""

from __future__ import annotations

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
