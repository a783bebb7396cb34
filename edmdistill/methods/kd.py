"""KD: knowledge distillation, regression on the ends of the teacher's trajectories from noise.

Luhman & Luhman 2021 (Denoising Student); in several steps as NVIDIA's FastGen has it.

    x_T = sin(T) z                        noise alone
    x_T ... x_t ... x_0                   the teacher's trajectory, by K steps of DPM-Solver++(2M)
    L   = d(f(x_t, t), x_0),              t: T, and the other levels that the generator is asked at

Differs: the paper makes the pairs (x_T, x_0) once, by DDIM, and stores them; here each is made when it is needed, and
serves once. FastGen draws one of the steps for each pair; here every trajectory teaches all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.backward_simulation import StepLevels, require_descending, step_levels
from edmdistill.methods.base import Batch, Loss, NoiseRange, Role, Sampling, Turn, with_inputs
from edmdistill.methods.distances import Distance, PerceptionFile, check_distance, distance_of, perception_roles
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range
from edmdistill.methods.noising import initial_noise
from edmdistill.methods.solver import multistep_trajectory
from edmdistill.schedules import curve_through
from edmdistill.transfer import Constant
from edmdistill.trigflow import denoised, sigma_to_time


class KDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    trajectory_steps: Annotated[int, Meta(ge=1, le=1000, description="K, steps of the teacher's trajectories")] = 18
    levels: StepLevels = ()
    distance: Distance = "l2"
    lpips: PerceptionFile = ""
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"

    def __post_init__(self) -> None:
        require_descending(self.levels)
        check_distance(self)
        check_range(self)
        if self.trajectory_steps <= len(self.levels):
            raise ValueError(
                f"trajectory_steps = {self.trajectory_steps} is less than the {1 + len(self.levels)} steps of the "
                f"generator, which start from points of a trajectory: set it to {1 + len(self.levels)} at least"
            )


class KD(GuidedMethod[KDConfig]):
    Config = KDConfig
    noise_levels = ("levels",)
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True)}

    def __init__(self, config: KDConfig, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator, self.distance = networks["generator"], distance_of(config, networks)
        sigmas, self.starts = curve_through(config.levels, config.trajectory_steps, noise.sigma_min, noise.sigma_max)
        self.times = Constant(sigma_to_time(sigmas, noise.sigma_data))

    @classmethod
    def roles_for(cls, config: KDConfig) -> dict[str, Role]:
        return super().roles_for(config) | perception_roles(config.lpips)

    @classmethod
    def sampling(cls, config: KDConfig) -> Sampling:
        return Sampling(1 + len(config.levels))

    @classmethod
    def schedule(cls, config: KDConfig, noise: NoiseRange) -> tuple[float, ...]:
        return step_levels(config.levels, noise)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.regression_loss),)

    def regression_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L, the mean over the steps of each trajectory.  Of the batch it reads labels and shape alone."""
        (sigma_data, _, sigma_max), steps = self.noise, len(self.starts)
        w = self.teacher.weights(draws)
        x_T, _ = initial_noise(batch.x0, sigma_max, draws, sigma_data)
        times = self.times.on(x_T.device)[:, None].repeat(1, len(x_T))
        with torch.no_grad():
            points, x_0 = multistep_trajectory(lambda x, t: self.teacher(x, t, batch.labels, w), x_T, times, sigma_data)
        x_t, t = torch.cat([points[k] for k in self.starts]), torch.cat([times[k] for k in self.starts])
        labels, w = repeat(batch.labels, steps), repeat(w, steps)
        g = denoised(x_t, with_inputs(self.generator, w=w)(x_t, t, labels), t, sigma_data)
        value = self.distance(g, x_0.repeat(steps, 1, 1, 1)).reshape(steps, -1).mean(0)
        return Loss(value, times[0], {"distance": value.detach().mean()}, g.detach()[-len(x_T) :])


def repeat(rows: Tensor | None, times: int) -> Tensor | None:
    """Returns a batch so many times, one after the other; None of None.  [B,...] -> [times B,...]"""
    return rows if rows is None or times == 1 else torch.cat([rows] * times)
