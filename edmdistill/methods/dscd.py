"""dsCD: discrete-time consistency distillation with sCM's objective, over N intervals of EDM's noise levels.

Lu & Song 2025 (ICLR), algorithm 2 and appendix E. No derivative is needed: the teacher takes a DDIM step from t to the
level below, and the generator is trained to agree at both ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.adversarial import adversarial_turns, gan_roles
from edmdistill.methods.base import Batch, FlowFunction, Loss, NoiseRange, Role, Turn, with_inputs
from edmdistill.methods.consistency import ConsistencyConfig, tangent_loss, tangent_warmup
from edmdistill.methods.guidance import GuidanceRange, GuidedMethod, GuideKind, check_range
from edmdistill.methods.noising import one_step
from edmdistill.schedules import neighbor_sigmas
from edmdistill.trigflow import cos_sin, ddim_step, denoised, diffuse, sigma_to_time


class DSCDConfig(ConsistencyConfig, frozen=True, forbid_unknown_fields=True):
    intervals: Annotated[int, Meta(ge=2, le=100_000, description="N: intervals of EDM's noise levels")] = 1024
    guidance: GuidanceRange = (1.0, 1.0)
    guide: GuideKind = "classes"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self)


class DSCD(GuidedMethod[DSCDConfig]):
    Config = DSCDConfig
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True, logvars=1)}

    def __init__(self, config: DSCDConfig, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator = networks["generator"]

    @classmethod
    def roles_for(cls, config: DSCDConfig) -> dict[str, Role]:
        return super().roles_for(config) | gan_roles(config)

    def turns(self) -> tuple[Turn, ...]:
        return adversarial_turns(self.generator_loss, self.fake, self.networks, self.config)

    def fake(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns what the discriminator sees: images generated in one step, and the time they start from."""
        generator = with_inputs(self.generator, w=self.teacher.weights(draws))
        return one_step(generator, batch, self.noise.sigma_max, draws, self.noise.sigma_data)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 2."""
        config, (sigma_data, sigma_min, sigma_max) = self.config, self.noise
        sigmas = neighbor_sigmas(
            draws, config.intervals, sigma_min, sigma_max, P_mean=config.P_mean, P_std=config.P_std
        )
        t, t_before = (sigma_to_time(sigma, sigma_data) for sigma in sigmas)
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
        w = self.teacher.weights(draws)
        generator = with_inputs(self.generator, w=w)
        with torch.no_grad():
            dx = sigma_data * self.teacher(x_t, t, batch.labels, w)
        r = tangent_warmup(batch.images, config.warmup_images)
        F, g, u = discrete_tangent(generator, x_t, t, t_before, batch.labels, dx, r=r, sigma_data=sigma_data, u_at=(t,))
        return tangent_loss(F, g, u, t, config)._replace(generated=denoised(x_t, F.detach(), t, sigma_data))


def discrete_tangent(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    t_before: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    *,
    r: float,
    sigma_data: float,
    u_at: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Returns F; g = cos(t) Delta, without gradient; and u.  Delta is a difference quotient in place of df/dt.

    Delta = -cos(t') (sigma_d F - dx/dt)
            - r sin(t') (x_t + sigma_d (cos(t - t') F - F') / sin(t - t')),    F' = F(x_t', t')

    Args:
        t_before: t' < t, the end of the teacher's DDIM step.  [B]
        dx: dx_t/dt of the teacher.  [B,C,H,W]
        r: see `tangent_warmup`.
        u_at: the times of the log variances.  [B] each
    Source: sCM, eq. 37 and 39, algorithm 2.
    """
    with torch.no_grad():  # and before the pass with gradient, so that both share its dropout
        F_before = network(ddim_step(x_t, dx / sigma_data, t, t_before, sigma_data), t_before, labels)
    F, *u = network(x_t, t, labels, u_at=u_at)
    F_minus = F.detach()
    (cos, _), (cos_before, sin_before) = cos_sin(t, x_t), cos_sin(t_before, x_t)
    cos_step, sin_step = cos_sin(t - t_before, x_t)
    slope = (cos_step * F_minus - F_before) / sin_step
    Delta = -cos_before * (sigma_data * F_minus - dx) - r * sin_before * (x_t + sigma_data * slope)
    return F, cos * Delta, *u
