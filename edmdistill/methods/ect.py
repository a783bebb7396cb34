"""ECT: easy consistency tuning, by pairs of noise levels that close in; no teacher and no derivative.

Geng et al. 2024 (Consistency Models Made Easy), as the official code (training/loss.py) computes it.

    sigma_t ~ lognormal,   sigma_r = sigma_t (1 - n(sigma_t) / q^stage),  n(sigma) = 1 + k / (1 + e^(b sigma))
    x_t = x0 + sigma_t eps,   x_r = x0 + sigma_r eps                      one noise for both
    L = w(sigma_t) d(f(x_t, t), f^-(x_r, r))                              f^-(x, 0) = x
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, Role, Turn
from edmdistill.schedules import lognormal_sigmas
from edmdistill.trigflow import denoised, diffuse, expand, sigma_to_time

CLOSEST = 2.0**-20
"""Smallest relative distance of a pair: closer, float32 sees one noise level, and the distance has no gradient."""


class ECTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.1
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 2.0
    q: Annotated[float, Meta(gt=1, le=1e6, description="factor by which a pair closes in at each stage")] = 2.0
    stage_images: Annotated[int, Meta(ge=1, description="images of a stage")] = 25_600_000
    k: Annotated[float, Meta(ge=0, le=1e6, description="how much wider pairs are at low noise")] = 8.0
    b: Annotated[float, Meta(gt=0, le=1e6, description="how fast that ends as sigma rises")] = 1.0
    c: Annotated[float, Meta(ge=0, le=1e6, description="constant of the pseudo-Huber distance; 0 = L2 norm")] = 0.0


class ECT(Method[ECTConfig]):
    Config = ECTConfig
    roles = {"generator": Role(trained=True)}

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.consistency_loss),)

    def consistency_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L.  w(sigma) = 1 / sigma^2 + 1 / sigma_d^2."""
        config, generator, sigma_data = self.config, self.networks["generator"], self.noise.sigma_data
        sigma_t = lognormal_sigmas(draws, P_mean=config.P_mean, P_std=config.P_std)
        sigma_r = paired_sigma(sigma_t, 1 + batch.images // config.stage_images, config.q, config.k, config.b)
        z = draws.normal_like(batch.x0, sigma_data)
        t, r = sigma_to_time(sigma_t, sigma_data), sigma_to_time(sigma_r, sigma_data)
        with torch.no_grad():  # so that both share the dropout of the next pass
            x_r = diffuse(batch.x0, z, r)
            target = denoised(x_r, generator(x_r, r, batch.labels), r, sigma_data)
            target = torch.where(expand(r, target) > 0, target, batch.x0)
        x_t = diffuse(batch.x0, z, t)
        estimate = denoised(x_t, generator(x_t, t, batch.labels), t, sigma_data)
        distance = ((estimate - target).square().flatten(1).sum(1) + config.c**2).sqrt() - config.c
        weight = (sigma_t**-2 + sigma_data**-2).to(distance)
        return Loss(weight * distance, t, {"distance": distance.detach().mean()}, estimate.detach())


def paired_sigma(sigma: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """Returns sigma_r = max(0, sigma (1 - (1 + k / (1 + e^(b sigma))) / q^stage)).  sigma, sigma_r [B]

    Args:
        stage: from 1; every stage divides the distance of a pair by q.
    Source: ECT's mapping function, as in the official code.  Differs: 1 / q^stage stays above CLOSEST.
    """
    return (sigma * (1 - (1 + k * torch.sigmoid(-b * sigma)) * max(q**-stage, CLOSEST))).clamp(min=0)
