"""sCM: continuous-time consistency models, the algorithm of sCD (from a teacher) and sCT (from data alone).

Lu & Song 2025 (ICLR), algorithm 1.

    x_t = cos(t) x0 + sin(t) z              data at noise level t
    dx/dt = sigma_d F*(x_t, t)              the teacher's velocity (sCD), or cos(t) z - sin(t) x0 (sCT)
    g = cos(t) df/dt, normalized            the tangent of the consistency function f
    F <- F^- + g                            regression with weight e^-u(t)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.methods.adversarial import adversarial_turns, gan_roles
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Sampling, Turn, with_inputs
from edmdistill.methods.consistency import ConsistencyConfig, tangent_loss, tangent_warmup
from edmdistill.methods.noising import noised, one_step
from edmdistill.methods.tangents import TANGENTS
from edmdistill.schedules import lognormal_times
from edmdistill.trigflow import cos_sin, denoised


class ContinuousConfig(ConsistencyConfig, frozen=True, forbid_unknown_fields=True):
    """Options of every method that learns by tangents."""

    tangent: Annotated[
        Literal["exact", "finite-difference"], Meta(description="how the tangent is computed; exact is more accurate")
    ] = "exact"
    r_max: Annotated[float, Meta(ge=0, le=1, description="largest weight of the tangent's unstable term")] = 1.0
    allow_edm_time: Annotated[bool, Meta(description="allow a teacher whose time input is ln(sigma), not t")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r_max:
            refuse_idle(self, ("warmup_images", "tangent"), "r_max = 0", "set r_max above 0")


class SCMConfig(ContinuousConfig, frozen=True, forbid_unknown_fields=True):
    intervals: Annotated[
        int, Meta(ge=1, le=100_000, description="M: consistency to the start of each of M intervals of t")
    ] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan and self.intervals > 1:
            raise ValueError(
                f"gan judges images of a single step, but intervals = {self.intervals} needs as many steps: leave one "
                "of them at its default"
            )


ContinuousT = TypeVar("ContinuousT", bound=ContinuousConfig)
ConfigT = TypeVar("ConfigT", bound=SCMConfig)


class ContinuousConsistency(Method[ContinuousT]):
    """Algorithm 1, over pairs of times and along a trajectory that its methods define: sCM's, and flow maps'."""

    def __init__(self, config: ContinuousT, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator = networks["generator"]

    @classmethod
    def roles_for(cls, config: ContinuousT) -> dict[str, Role]:
        return super().roles_for(config) | gan_roles(config)

    @classmethod
    def check_teacher(
        cls, config: ContinuousT, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        """Source: sCM, section 4.1: the derivative of EDM's time embedding makes training unstable."""
        if positional_time or config.allow_edm_time:
            return super().check_teacher(
                config, positional_time=positional_time, label_dim=label_dim, label_dropout=label_dropout
            )
        return (
            "the teacher's time input is ln(sigma), whose embedding makes continuous-time training unstable: convert "
            "the teacher with --time-embedding positional and fine-tune it with `edmdistill train diffusion`, or use "
            "--set method.allow_edm_time=true"
        )

    def turns(self) -> tuple[Turn, ...]:
        return adversarial_turns(self.generator_loss, self.fake, self.networks, self.config)

    def fake(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns what the discriminator sees: images generated in one step, and the time they start from."""
        w, to_data = self.guidance_weights(draws), torch.zeros(len(batch.x0), device=batch.x0.device)
        return one_step(self.generator_to(to_data, w), batch, self.noise.sigma_max, draws, self.noise.sigma_data)

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 1.  Source: eq. 8."""
        sigma_data = self.noise.sigma_data
        t, d = self.draw_times(draws)
        x_t, v = noised(batch.x0, t, draws, sigma_data)
        w = self.guidance_weights(draws)
        F, g, *u = self.tangent(x_t, t, d, v, batch, w)
        loss = tangent_loss(F, g, torch.stack(u).sum(0), t, self.config)
        return loss._replace(generated=denoised(x_t, F.detach(), t, sigma_data))

    def tangent(
        self, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, batch: Batch, w: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns F, the tangent g along the trajectory, without gradient, and u.  [B,C,H,W] twice, [B] each"""
        with torch.no_grad():
            dx = self.velocity(x_t, t, batch.labels, v, w)
        return continuous_tangent(
            batch.conditioned(self.generator_to(t - d, w)),
            x_t,
            t,
            batch.labels,
            dx,
            d=d,
            r=tangent_warmup(batch.images, self.config.warmup_images, self.config.r_max),
            sigma_data=self.noise.sigma_data,
            u_at=self.weighted_at(t, d),
            by=self.config.tangent,
        )

    @abstractmethod
    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draws t, and the length d = t - s of the jump from it to s.  [B] each"""

    def generator_to(self, s: Tensor, w: Tensor | None) -> FlowFunction:
        """Returns the generator at guidance weight w, for jumps to s, where it reads them.  [B] each"""
        return with_inputs(self.generator, w=w)

    def weighted_at(self, t: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """Returns the times of the log variances whose sum is u.  [B] each"""
        return (t,)

    def guidance_weights(self, draws: Draws) -> Tensor | None:
        """Draws the guidance weight of each sample; None if it is fixed.  [B]"""
        return None

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns dx_t/dt along the trajectory; v is that of the data and its noise.  [B,C,H,W]"""


class SCM(ContinuousConsistency[ConfigT]):
    """sCM: jumps to the data, or to the start of each interval, along a trajectory that sCT and sCD define."""

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        config = self.config
        t = lognormal_times(draws, self.noise.sigma_data, P_mean=config.P_mean, P_std=config.P_std)
        return t, time_in_interval(t, config.intervals)

    @classmethod
    def sampling(cls, config: ConfigT) -> Sampling:
        return Sampling(config.intervals, gamma=0.0) if config.intervals > 1 else Sampling()

    @classmethod
    def schedule(cls, config: ConfigT, noise: NoiseRange) -> tuple[float, ...]:
        """Returns the ends of the intervals, the last of them at sigma_max.

        Raises: EdmDistillError: the last one begins above sigma_max.
        """
        M, (sigma_data, _, sigma_max) = config.intervals, noise
        if (most := int(math.pi / 2 / math.atan(sigma_data / sigma_max))) < M:
            raise EdmDistillError(
                f"method.intervals = {M} makes intervals that begin above the teacher's highest noise level, "
                f"{sigma_max:g}, where no step does: set it to {most} at most"
            )
        return (sigma_max, *(sigma_data * math.tan(math.pi / 2 * k / M) for k in range(M - 1, 0, -1))) if M > 1 else ()


def continuous_tangent(
    network: FlowFunction,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    dx: Tensor,
    *,
    d: Tensor,
    r: float,
    sigma_data: float,
    u_at: tuple[Tensor, ...],
    by: str = "exact",
) -> tuple[Tensor, ...]:
    """Returns F; g, without gradient; and the log variances u.  [B,C,H,W] twice, [B] each

    The derivative is taken along cos(d) sin(d) (dx_t/dt, 1), since dF/dt itself is unbounded.

    Args:
        dx: dx_t/dt of the teacher or of the data.  [B,C,H,W]
        d: t - s, in [0, pi/2].  [B]
        r: see `tangent_warmup`.
        u_at: the times of the log variances.  [B] each
        by: a key of TANGENTS.
    Source: sCM, section 5.1, "JVP rearrangement".
    """
    cos, sin = cos_sin(d, x_t)
    F, dF, *u = TANGENTS[by](network, x_t, t, labels, cos * sin * dx, d.cos() * d.sin(), u_at)
    F_minus = F.detach()
    return F, -(cos**2) * (sigma_data * F_minus - dx) - r * (cos * sin * x_t + sigma_data * dF), *u


def time_in_interval(t: Tensor, intervals: int) -> Tensor:
    """Returns d = t - s, where s is the start of t's interval when [0, pi/2] is divided into M equal ones.  [B]

    Source: sCM, appendix G; Heek et al. 2024 (multistep consistency models).
    """
    length = math.pi / 2 / intervals
    return t - (t / length).floor().clamp(max=intervals - 1) * length
