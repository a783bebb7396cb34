"""Noisy images for training: points of the forward process, and the noise that one-step generation starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction
from edmdistill.trigflow import cos_sin, denoised, diffuse, sigma_to_time, velocity


def noised(x0: Tensor, t: Tensor, draws: Draws, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Draws z ~ N(0, sigma_data^2 I) and returns x_t and its velocity dx_t/dt; gradients flow through x0.

        x_t = cos(t) x0 + sin(t) z,      dx_t/dt = cos(t) z - sin(t) x0

    Args:
        x0: images.  [B,C,H,W]
        t: times in [0, pi/2].  [B]
    Source: Lu & Song 2025 (sCM), section 3.
    """
    z = draws.normal_like(x0, sigma_data)
    return diffuse(x0, z, t), velocity(x0, z, t)


def time_of_rows(like: Tensor, sigma: float, sigma_data: float) -> Tensor:
    """Returns the time of a noise level for each row of a tensor, on its device.  like [B,...] -> [B] float64"""
    return like.new_full((len(like),), float(sigma_to_time(sigma, sigma_data)), dtype=torch.float64)


def initial_noise(like: Tensor, sigma: float, draws: Draws, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Draws the input of one-step generation and returns it with its time: x_t = sin(t) z, no data in it.

    Args:
        like: gives shape and dtype; its values are not used.  [B,C,H,W]
        sigma: noise level at which the generator starts.
    Returns: x_t [B,C,H,W] and t [B].
    Source: Zhou et al. 2024 (SiD), algorithm 1; sCM, table 4, with t_max = arctan(sigma_max / sigma_d).
    Differs: sCM's appendix C.2 starts at pi/2, outside the noise range of pretrained networks. The weight of z there
        and at sigma_max = 80 differs by 2e-5.
    """
    t = time_of_rows(like, sigma, sigma_data)
    return cos_sin(t, like)[1] * draws.normal_like(like, sigma_data), t


def one_step(
    generator: FlowFunction, batch: Batch, sigma: float, draws: Draws, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """Returns an image that the generator makes from noise for each label of the batch, and its start.

    Args:
        sigma: noise level at which the generator starts.
    Returns: images [B,C,H,W] and t [B].
    """
    x_t, t = initial_noise(batch.x0, sigma, draws, sigma_data)
    return denoised(x_t, generator(x_t, t, batch.labels), t, sigma_data), t
