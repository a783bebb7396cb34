"""ECT: easy consistency tuning, by pairs of noise levels that close in; no teacher and no derivative.

Geng et al. 2024 (Consistency Models Made Easy), as the official code (training/loss.py) computes it.

    sigma_t ~ lognormal,   sigma_r = sigma_t (1 - n(sigma_t) / q^(1 + stage)),   stage = 0, 1 ...
    n(sigma) = 1 + k / (1 + e^(b sigma))                                  pairs are wider at low noise
    x_t = x0 + sigma_t eps,   x_r = x0 + sigma_r eps                      one noise for both
    L = w(sigma_t, sigma_r) d(f(x_t, t), f^-(x_r, r))                     f^-(x, 0) = x

With `intervals`, the pairs are iCT's (Song & Dhariwal 2023): neighbors on EDM's grid, finer at each stage.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, Role, Turn
from edmdistill.methods.pairs import ClosingPairsConfig, closing_pair, compare_pair, norm_distance, pair_weight
from edmdistill.schedules import neighbor_sigmas

Intervals = Annotated[int, Meta(ge=1, le=1_000_000)]


class ECTConfig(ClosingPairsConfig, frozen=True, forbid_unknown_fields=True):
    intervals: Annotated[
        tuple[Intervals, Intervals] | None,
        Meta(description="pairs are neighbors of a grid with so many intervals, at first and at most; iCT: [10, 1280]"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervals is not None and self.intervals[0] > self.intervals[1]:
            raise ValueError(f"intervals = {list(self.intervals)} decreases: give the first number, then the largest")
        if self.intervals is not None:
            refuse_idle(self, ("k", "b"), "intervals", "leave out intervals")


class ECT(Method[ECTConfig]):
    Config = ECTConfig
    roles = {"generator": Role(trained=True)}

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.consistency_loss),)

    def consistency_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L."""
        config, sigma_data = self.config, self.noise.sigma_data
        sigma_t, sigma_r = self.draw_pair(batch.images, draws)
        distance = partial(norm_distance, c=config.c)
        pair = compare_pair(
            self.networks["generator"], batch, sigma_t, sigma_r, draws, sigma_data=sigma_data, distance=distance
        )
        weight = pair_weight(config.weighting, sigma_t, sigma_r, sigma_data).to(pair.distance)
        return Loss(weight * pair.distance, pair.t, {"distance": pair.distance.detach().mean()}, pair.estimate)

    def draw_pair(self, images: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draws sigma_t and sigma_r after so many images.  [B] each

        Differs: iCT's lowest level is sigma_min, where its f is the identity; here 0.
        """
        config, (_, sigma_min, sigma_max) = self.config, self.noise
        if config.intervals is None:
            return closing_pair(draws, images, config)
        first, most = map(math.log, config.intervals)
        intervals = round(math.exp(min(first + images // config.stage_images * math.log(config.q), most)))
        return neighbor_sigmas(draws, intervals, sigma_min, sigma_max, P_mean=config.P_mean, P_std=config.P_std)
