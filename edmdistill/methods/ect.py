"""ECT: easy consistency tuning, by pairs of noise levels that close in; no teacher and no derivative.

Geng et al. 2024 (Consistency Models Made Easy), as the official code (training/loss.py) computes it.

    sigma_t ~ lognormal,   sigma_r = sigma_t (1 - n(sigma_t) / q^stage),  n(sigma) = 1 + k / (1 + e^(b sigma))
    x_t = x0 + sigma_t eps,   x_r = x0 + sigma_r eps                      one noise for both
    L = w(sigma_t) d(f(x_t, t), f^-(x_r, r))                              f^-(x, 0) = x
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, Role, Turn
from edmdistill.methods.pairs import CLOSEST, PairsConfig, compare_pair, inverse_c_out_squared, paired_sigma
from edmdistill.schedules import lognormal_sigmas


class ECTConfig(PairsConfig, frozen=True, forbid_unknown_fields=True):
    q: Annotated[float, Meta(gt=1, le=1e6, description="factor by which a pair closes in at each stage")] = 2.0
    stage_images: Annotated[int, Meta(ge=1, description="images of a stage")] = 25_600_000


class ECT(Method[ECTConfig]):
    Config = ECTConfig
    roles = {"generator": Role(trained=True)}

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.consistency_loss),)

    def consistency_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L.  w(sigma) = 1 / sigma^2 + 1 / sigma_d^2.

        Differs: 1 / q^stage stays above CLOSEST.
        """
        config, sigma_data = self.config, self.noise.sigma_data
        sigma_t = lognormal_sigmas(draws, P_mean=config.P_mean, P_std=config.P_std)
        stage = 1 + batch.images // config.stage_images
        sigma_r = paired_sigma(sigma_t, max(config.q**-stage, CLOSEST), config.k, config.b)
        pair = compare_pair(
            self.networks["generator"], batch, sigma_t, sigma_r, draws, sigma_data=sigma_data, c=config.c
        )
        weight = inverse_c_out_squared(sigma_t, sigma_data).to(pair.distance)
        return Loss(weight * pair.distance, pair.t, {"distance": pair.distance.detach().mean()}, pair.estimate)
