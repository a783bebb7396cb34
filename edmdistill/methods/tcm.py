"""TCM: truncated consistency models, a second stage that trains a consistency model at high noise alone.

Lee et al. 2025 (ICLR), as the official code (NVlabs/tcm, training/loss.py) computes it. The first stage, a finished
consistency model f0 from every noise level to data, is the frozen teacher and where the generator f starts.

    sigma_t = sigma'                               for the share rho of the batch: the boundary
    ln(sigma_t) ~ Student's t in [ln sigma', ln sigma_max]     for the rest
    f^-(x_r, r) = f(x_r, r) if sigma_r >= sigma', else f0(x_r, r)
    L = L_C + w_b L_B,   each the mean of w(sigma_t) d(f(x_t, t), f^-(x_r, r)), of the rest and of the boundary

The boundary keeps f from collapsing: only there is it held to the data, through f0. Below sigma' the generator is not
trained, and not to be used: its checkpoint has sigma' as its sigma_min, where the default sampling levels end.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, Role, Turn
from edmdistill.methods.pairs import Gap, PairsConfig, compare_pair, norm_distance, pair_weight, paired_sigma
from edmdistill.schedules import student_sigmas
from edmdistill.trigflow import expand, sigma_to_time


class TCMConfig(PairsConfig, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="center of ln(sigma)")] = 0.0
    P_std: Annotated[float, Meta(gt=0, le=20, description="scale of ln(sigma)")] = 0.2
    degrees: Annotated[
        float, Meta(ge=1e-3, le=1e6, description="degrees of freedom of ln(sigma); few: heavy tails")
    ] = 0.01
    boundary: Annotated[float, Meta(ge=1e-3, le=1e3, description="sigma', the lowest noise level that is trained")] = (
        1.0
    )
    boundary_share: Annotated[float, Meta(gt=0, lt=1, description="rho, share of images at the boundary")] = 0.25
    boundary_weight: Annotated[float, Meta(ge=0, le=1e6, description="w_b, weight of the boundary's loss")] = 0.1
    gap: Gap = 0.001
    c: Annotated[float, Meta(ge=0, le=1e6, description="constant of the pseudo-Huber distance; 0 = L2 norm")] = 1e-8


class TCM(Method[TCMConfig]):
    """Differs: which images lie on the boundary is drawn for each, where the official code takes a fixed number; the
    frozen first stage has no dropout.
    """

    Config = TCMConfig
    noise_levels = ("boundary",)
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True)}
    first_stages: ClassVar[tuple[str, ...]] = ("ect", "sct", "scd", "dscd", "cd")

    @classmethod
    def roles_for(cls, config: TCMConfig) -> dict[str, Role]:
        return cls.roles | {"generator": Role(trained=True, sigma_min=config.boundary)}

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.truncated_loss),)

    def truncated_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L.  Source: the paper's algorithm 1."""
        config, (sigma_data, _, sigma_max) = self.config, self.noise
        at_boundary = draws.uniform() < config.boundary_share
        sigma_t = student_sigmas(
            draws, P_mean=config.P_mean, P_std=config.P_std, degrees=config.degrees, low=config.boundary, high=sigma_max
        )
        sigma_t = torch.where(at_boundary, config.boundary, sigma_t)
        sigma_r = paired_sigma(sigma_t, config.gap, config.k, config.b)
        pair = compare_pair(
            self.networks["generator"],
            batch,
            sigma_t,
            sigma_r,
            draws,
            sigma_data=sigma_data,
            distance=partial(norm_distance, c=config.c),
            target=self.truncated,
        )
        weight = pair_weight(config.weighting, sigma_t, sigma_r, sigma_data)
        share = config.boundary_share
        weight = torch.where(at_boundary, weight * config.boundary_weight / share, weight / (1 - share))
        signals = {"distance": pair.distance.detach().mean()}
        return Loss(weight.to(pair.distance) * pair.distance, pair.t, signals, pair.estimate)

    def truncated(self, x_r: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """Returns F of the generator from the boundary on, and of the first stage below it.  [B,C,H,W]"""
        F, F_first = self.networks["generator"](x_r, r, labels), self.networks["teacher"](x_r, r, labels)
        return torch.where(expand(r, x_r) >= sigma_to_time(self.config.boundary, self.noise.sigma_data), F, F_first)
