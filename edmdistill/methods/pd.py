"""PD: progressive distillation, a generator of N steps, each of which does what two of its teacher's do.

Salimans & Ho 2022 (ICLR), algorithm 2.

    sigma_0 = sigma_max > ... > sigma_2N = 0    the teacher's levels, equidistant in t; every second is the generator's
    t, t', s                                    times of sigma_2i, sigma_2i+1 and sigma_2i+2, i uniform
    x_t   = cos(t) x0 + sin(t) z                at sigma_max noise alone
    x_t', x_s                                   by a DDIM step of the teacher each
    F*                                          the DDIM step by F* leads from x_t to x_s at once
    L     = w(t) |F(x_t, t) - F*|^2

A run is a stage. The first has a diffusion model for its teacher, each later one the generator of 2 N steps before it.

Differs: angles and SNR = cot(t)^2 count data of deviation sigma_d, and the paper's, of its cosine schedule, data of 1.
|F - F*|^2 is SNR + 1 times the squared error of the image, over sigma_d^2. The paper's max(SNR, 1), weighting =
"truncated", is 1/2 to 1 times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError, counted
from edmdistill.methods.base import Batch, Loss, NoiseRange, Role, Sampling, Turn, with_inputs
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range
from edmdistill.methods.noising import noised
from edmdistill.transfer import Constant
from edmdistill.trigflow import ddim_flow, ddim_step, denoised, expand, sigma_to_time, time_to_sigma


class PDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: Annotated[int, Meta(ge=1, le=1024, description="N, steps of the generator, half of its teacher's")] = 4
    weighting: Annotated[
        Literal["snr+1", "truncated"], Meta(description="weight of the image's error: SNR + 1, or max(SNR, 1)")
    ] = "snr+1"
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"

    def __post_init__(self) -> None:
        check_range(self)


class PD(GuidedMethod[PDConfig]):
    Config = PDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True)}
    first_stages: ClassVar[tuple[str, ...]] = ("diffusion", "pd")
    stages_have_steps = True

    def __init__(self, config: PDConfig, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        times = step_times(2 * config.steps, noise)
        if times[-2] < (lowest := sigma_to_time(noise.sigma_min, noise.sigma_data)):
            raise EdmDistillError(
                f"method.steps = {config.steps} asks the teacher below {noise.sigma_min:g}, its lowest noise level: "
                f"set it to {int(times[0] / lowest) // 2} at most"
            )
        self.generator, self.times = networks["generator"], Constant(times)

    @classmethod
    def sampling(cls, config: PDConfig) -> Sampling:
        return Sampling(config.steps, gamma=0.0)

    @classmethod
    def schedule(cls, config: PDConfig, noise: NoiseRange) -> tuple[float, ...]:
        return noise.sigma_max, *time_to_sigma(step_times(config.steps, noise)[1:-1], noise.sigma_data).tolist()

    @classmethod
    def check_stage(cls, config: PDConfig, steps: int) -> str | None:
        if steps == 2 * config.steps:
            return None
        of, needed = counted(steps, "step"), f"one of {2 * config.steps}"
        if steps % 2:
            return f"it has {of}, an odd number, which cannot be halved: give {needed}"
        return f"it has {of}, and method.steps = {config.steps} takes {needed}: set method.steps={steps // 2}"

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.halving_loss),)

    def halving_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L, the mean over pixels.  Source: algorithm 2."""
        sigma_data = self.noise.sigma_data
        i = (draws.uniform() * self.config.steps).long()
        times = self.times.on(draws.device)
        t, between, s = (times[2 * i + step] for step in range(3))
        x_t, _ = noised(torch.where(expand(i, batch.x0) > 0, batch.x0, 0.0), t, draws, sigma_data)
        w = self.teacher.weights(draws)
        flow = partial(self.teacher, labels=batch.labels, w=w)
        with torch.no_grad():
            x = ddim_step(x_t, flow(x_t, t), t, between, sigma_data)
            x_s = ddim_step(x, flow(x, between), between, s, sigma_data)
        F = with_inputs(self.generator, w=w)(x_t, t, batch.labels)
        error = (F - ddim_flow(x_t, x_s, t, s, sigma_data)).square().flatten(1).mean(1)
        if self.config.weighting == "truncated":
            error = error * torch.maximum(t.cos(), t.sin()).square().to(error)
        return Loss(error, t, {}, denoised(x_t, F.detach(), t, sigma_data))


def step_times(steps: int, noise: NoiseRange) -> Tensor:
    """Returns the times between so many steps, sigma_max's first and 0 last; half as many have every second.  [N+1]"""
    share = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return share * sigma_to_time(noise.sigma_max, noise.sigma_data)
