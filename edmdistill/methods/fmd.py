"""FMD: flow-map distillation, a generator for any number of steps, with or without noise between them.

After Sabour, Fidler & Kreis 2025 (Align Your Flow).

    t, s ~ intervals of [0, t_max]          x_t = cos(t) x0 + sin(t) z
    v = sigma_d F*(x_t, t)                  the teacher's velocity, guided if asked
    eulerian:    g = cos(d) df/dt           along (v, 1), s fixed
    lagrangian:  g = -k (df/ds - v(f, s))   along s, t fixed; the teacher is asked at the end of the jump
    F <- F^- + g / (|g| + c)                regression with weight e^-u(t, s)

Differs: with `trajectory_steps`, the map also learns the teacher's jumps between points of its trajectories: alone for
`trajectory_images`, then beside the tangents. There `trajectory_weight` multiplies a sum over an image's numbers, and
the tangents' loss is their mean.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.adversarial import adversarial_turns
from edmdistill.methods.base import Batch, Loss, Role, Turn, with_inputs
from edmdistill.methods.flow_map import GENERATOR, FlowMap, FlowMapConfig, lagrangian_tangent
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range
from edmdistill.methods.trajectories import TrajectorySteps, TrajectoryWeight, WarmupImages, trajectory_loss

Objective = Literal["eulerian", "lagrangian"]


class FMDConfig(FlowMapConfig, frozen=True, forbid_unknown_fields=True):
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"
    objective: Annotated[Objective, Meta(description="eulerian: t moves along the trajectory; lagrangian: s moves")] = (
        "eulerian"
    )
    trajectory_steps: TrajectorySteps = 0
    trajectory_weight: TrajectoryWeight = 0.5
    trajectory_images: WarmupImages = 0
    share_to_max: Annotated[float, Meta(ge=0, le=1, description="share of trajectories from sigma_max")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self)
        if self.objective == "lagrangian":
            names = "warmup_images", "r_max", "tangent"
            refuse_idle(self, names, 'objective = "lagrangian"', 'set objective = "eulerian"')
        if not self.trajectory_steps:
            names = "trajectory_weight", "trajectory_images", "share_to_max"
            refuse_idle(self, names, "trajectory_steps = 0", "set trajectory_steps above 0")


class FMD(FlowMap[FMDConfig], GuidedMethod[FMDConfig]):
    Config = FMDConfig
    roles = {"teacher": Role(trained=False), "generator": GENERATOR}

    def turns(self) -> tuple[Turn, ...]:
        begins = self.config.trajectory_images  # until then, the generator learns trajectories alone
        return adversarial_turns(self.generator_loss, self.fake, self.networks, self.config, begins)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the loss of tangents, that of trajectories, or their weighted sum."""
        config = self.config
        if not config.trajectory_steps:
            return super().generator_loss(batch, draws)
        trajectories = self.trajectory_loss(batch, draws)
        if batch.images < config.trajectory_images:
            return trajectories
        return super().generator_loss(batch, draws).plus(trajectories, config.trajectory_weight)

    def trajectory_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the loss of jumps between points of the guided teacher's trajectories."""
        config, w = self.config, self.guidance_weights(draws)
        guided = with_inputs(self.generator, w=None if w is None else w.repeat(config.trajectory_steps))

        def generator(x_t: Tensor, t: Tensor, labels: Tensor | None, s: Tensor) -> Tensor:
            # With a gradient of 0 in the log variances: DDP waits for all weights that a loss reaches, now or later.
            F, *u = guided(x_t, t, labels, s, u_at=self.weighted_at(t, t - s))
            return F + 0 * torch.stack(u).sum()

        return trajectory_loss(
            generator,
            partial(self.teacher, w=w),
            batch,
            draws,
            self.noise,
            steps=config.trajectory_steps,
            share_to_max=config.share_to_max,
            share_to_end=config.share_to_data,
        )

    def tangent(
        self, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, batch: Batch, w: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns F, g and u.  Source: AYF, its objectives EMD (eulerian) and LMD (lagrangian)."""
        if self.config.objective == "eulerian":
            return super().tangent(x_t, t, d, v, batch, w)
        return lagrangian_tangent(
            self.generator,
            partial(self.velocity, labels=batch.labels, v=v, w=w),
            x_t,
            t,
            t - d,
            batch.labels,
            sigma_data=self.noise.sigma_data,
            u_at=self.weighted_at(t, d),
            w=w,
        )

    def guidance_weights(self, draws: Draws) -> Tensor | None:
        return self.teacher.weights(draws)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns sigma_d F*(x_t, t), guided."""
        return self.noise.sigma_data * self.teacher(x_t, t, labels, w=w)
