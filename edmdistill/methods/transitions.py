"""CoSIM's transition: from data with noise, by the generator's estimate of the data, to a lower noise level.

x_t ~ p(x_t | x0),      g = G_phi(x_t, t),      x_s = cos(s) g + sin(s) z,      s < t
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, NoiseRange
from edmdistill.methods.cosim_config import CoSIMConfig
from edmdistill.methods.noising import noised
from edmdistill.schedules import cosim_sigmas, start_first_sigmas
from edmdistill.trigflow import denoised, diffuse, sigma_to_time


class Transition(NamedTuple):
    """A draw of algorithm 2, lines 1-3.  s, t [B]; x_t, F, g, x_s, v [B,C,H,W].

    F is the generator's output at x_t and g its image; v is the velocity of (g, z) at s.
    """

    s: Tensor
    t: Tensor
    x_t: Tensor
    F: Tensor
    g: Tensor
    x_s: Tensor
    v: Tensor


def draw_transition(
    generator: FlowFunction,
    batch: Batch,
    draws: Draws,
    noise: NoiseRange,
    config: CoSIMConfig,
    sigma_from: float = 0.0,
) -> Transition:
    """Draws (s, t), x_t and x_s.  Source: Yu et al. 2025 (CoSIM), appendix A.1 for (s, t), eq. 18 for x_s.

    Args:
        sigma_from: lowest noise level t of a jump; for order = "t" alone.
    """
    sigma_data, sigma_min, sigma_max = noise
    levels = {"sigma_min": sigma_min, "sigma_max": sigma_max, "share_to_max": config.share_to_max}
    if config.order == "t":
        sigma_s, sigma_t = start_first_sigmas(draws, **levels, sigma_from=sigma_from)
    else:
        sigma_s, sigma_t = cosim_sigmas(draws, **levels, R=config.R, r_s_max=config.r_s_max)
    s, t = sigma_to_time(sigma_s, sigma_data), sigma_to_time(sigma_t, sigma_data)
    x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
    F = generator(x_t, t, batch.labels)
    g = denoised(x_t, F, t, sigma_data)
    return Transition(s, t, x_t, F, g, *noised(g, s, draws, sigma_data))
