"""CD: consistency distillation, a generator that agrees with itself at both ends of a step of the teacher's solver.

Song et al. 2023 (Consistency Models), algorithm 2; with ECT's closing pairs as in NVIDIA's FastGen (CM with use_cd).

    sigma_0 = 0 < ... < sigma_N-1 = sigma_max                 EDM's curve; n uniform
    x_t = x0 + sigma_n+1 eps
    x_r = Solver(x_t, sigma_n+1, sigma_n)                     one step of the teacher's, Heun's or Euler's
    L   = w d(f(x_t, t), f^-(x_r, r)),      f^-(x, 0) = x     f^-: the average of f at decay mu; f itself at mu = 0

Differs: the paper's lowest level is sigma_min, where its f is the identity; here it is 0, and the step there Euler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, EmaOf, Loss, NoiseRange, Role, Turn, with_inputs
from edmdistill.methods.distances import Distance, PerceptionFile, check_distance, distance_of, perception_roles
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range
from edmdistill.methods.pairs import (
    ClosingPairsConfig,
    Weighting,
    closing_pair,
    compare_pair,
    norm_distance,
    pair_weight,
)
from edmdistill.methods.solver import heun_step
from edmdistill.schedules import edm_curve
from edmdistill.transfer import Constant
from edmdistill.trigflow import ddim_step


class CDConfig(ClosingPairsConfig, frozen=True, forbid_unknown_fields=True):
    """Options; the defaults are the official code's for CIFAR-10 with the distance l2."""

    pairs: Annotated[
        Literal["grid", "closing"],
        Meta(description="grid: neighbors of N noise levels, as in the paper; closing: ECT's, which close in"),
    ] = "grid"
    N: Annotated[int, Meta(ge=2, le=100_000, description="noise levels on EDM's curve")] = 18
    solver: Annotated[Literal["heun", "euler"], Meta(description="the teacher's step")] = "heun"
    mu: Annotated[
        float, Meta(ge=0, lt=1, description="EMA decay of the target network, per step; 0 = the generator itself")
    ] = 0.0
    distance: Distance = "l2"
    lpips: PerceptionFile = ""
    weighting: Weighting = "none"
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"

    def __post_init__(self) -> None:
        if self.pairs == "grid":
            names = "P_mean", "P_std", "k", "b", "q", "stage_images"
            refuse_idle(self, names, 'pairs = "grid"', 'set pairs = "closing"')
        else:
            refuse_idle(self, ("N",), 'pairs = "closing"', 'set pairs = "grid"')
        if self.distance != "pseudo-huber":
            refuse_idle(self, ("c",), f'distance = "{self.distance}"', 'set distance = "pseudo-huber"')
        super().__post_init__()
        check_distance(self)
        check_range(self)


class CD(GuidedMethod[CDConfig]):
    Config = CDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True)}

    def __init__(self, config: CDConfig, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator, self.target = networks["generator"], networks["target" if config.mu else "generator"]
        huber = partial(norm_distance, c=config.c)
        self.distance = huber if config.distance == "pseudo-huber" else distance_of(config, networks)
        r = torch.arange(1, config.N, dtype=torch.float64) / (config.N - 1)
        zero = torch.zeros(1, dtype=torch.float64)
        self.sigmas = Constant(torch.cat([zero, edm_curve(r, noise.sigma_min, noise.sigma_max)]))

    @classmethod
    def roles_for(cls, config: CDConfig) -> dict[str, Role]:
        roles = super().roles_for(config)
        if config.mu:
            roles["target"] = roles["generator"]._replace(trained=False, ema_of=EmaOf("generator", config.mu))
        return roles | perception_roles(config.lpips)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.consistency_loss),)

    def consistency_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L.  Source: algorithm 2."""
        config, sigma_data = self.config, self.noise.sigma_data
        sigma_t, sigma_r = self.draw_pair(batch.images, draws)
        w = self.teacher.weights(draws)

        def step(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
            flow = partial(self.teacher, labels=batch.labels, w=w)
            if config.solver == "heun":
                return heun_step(flow, x_t, t, r, sigma_data)
            return ddim_step(x_t, flow(x_t, t), t, r, sigma_data)

        pair = compare_pair(
            with_inputs(self.generator, w=w),
            batch,
            sigma_t,
            sigma_r,
            draws,
            sigma_data=sigma_data,
            distance=self.distance,
            target=with_inputs(self.target, w=w),
            step=step,
        )
        weight = pair_weight(config.weighting, sigma_t, sigma_r, sigma_data).to(pair.distance)
        return Loss(weight * pair.distance, pair.t, {"distance": pair.distance.detach().mean()}, pair.estimate)

    def draw_pair(self, images: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draws sigma_t and sigma_r after so many images.  [B] each"""
        if self.config.pairs == "closing":
            return closing_pair(draws, images, self.config)
        sigmas = self.sigmas.on(draws.device)
        n = (draws.uniform() * (self.config.N - 1)).long()
        return sigmas[n + 1], sigmas[n]
