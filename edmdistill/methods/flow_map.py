"""Flow maps: generators that jump from any time t to any earlier s, learned by tangents.

    f(x_t, t, s) = cos(d) x_t - sin(d) sigma_d F(x_t, t; s),    d = t - s

The network reads both times: s = 0 is sCM's consistency function, and s -> t the velocity of diffusion training. The
algorithm is sCM's, with s fixed while t and x_t move along the trajectory (the Eulerian condition df/dt = 0), or with t
fixed while s moves (the Lagrangian condition df/ds = the velocity at f).

Source: Sabour, Fidler & Kreis 2025 (Align Your Flow, AYF); Boffi, Albergo & Vanden-Eijnden 2025 (flow map
matching). Derived here for TrigFlow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.base import FlowFunction, Role, SecondGain, with_inputs
from edmdistill.methods.scm import ContinuousConfig, ContinuousConsistency
from edmdistill.schedules import interval_times, lognormal_pairs
from edmdistill.trigflow import cos_sin, ddim_step, expand


class FlowMapConfig(ContinuousConfig, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of the logit of a jump's length")] = -0.8
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of the same")] = 1.0
    share_to_data: Annotated[float, Meta(ge=0, le=1, description="share of jumps that end at the data")] = 0.25
    times: Annotated[
        Literal["interval", "lognormal"], Meta(description="lognormal: P_mean and P_std are of ln(sigma)")
    ] = "interval"
    P_mean_s: Annotated[float, Meta(ge=-20, le=20)] | None = None
    """Mean of ln(sigma) of a jump's other end, if times = "lognormal"; default: P_mean. The higher end is its start."""
    P_std_s: Annotated[float, Meta(gt=0, le=20)] | None = None
    """Standard deviation of the same; default: P_std."""
    share_still: Annotated[float, Meta(ge=0, le=1, description="share of jumps of no length: diffusion training")] = 0.0
    s_gain: SecondGain = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times == "interval":
            refuse_idle(self, ("P_mean_s", "P_std_s"), 'times = "interval"', 'set times = "lognormal"')


FlowMapT = TypeVar("FlowMapT", bound=FlowMapConfig)
GENERATOR = Role(trained=True, two_time=True, logvars=2)


class FlowMap(ContinuousConsistency[FlowMapT]):
    """A generator of two times, over intervals drawn from the whole range.

    Differs: AYF weights the loss by one function u(t, s); here it is u_1(t) + u_2(s), of the network's heads of one
    time.
    """

    roles: ClassVar[dict[str, Role]] = {"generator": GENERATOR}

    @classmethod
    def roles_for(cls, config: FlowMapT) -> dict[str, Role]:
        roles = super().roles_for(config)
        return roles | {"generator": roles["generator"]._replace(second_gain=config.s_gain)}

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        config, noise = self.config, self.noise
        t_max = math.atan(noise.sigma_max / noise.sigma_data)
        law = {"P_mean": config.P_mean, "P_std": config.P_std, "share_to_data": config.share_to_data}
        if config.times == "interval":
            t, d = interval_times(draws, t_max, **law)
        else:
            t, d = lognormal_pairs(
                draws, noise.sigma_data, t_max, P_mean_s=config.P_mean_s, P_std_s=config.P_std_s, **law
            )
        return t, torch.where(draws.uniform() < config.share_still, 0, d) if config.share_still else d

    def generator_to(self, s: Tensor, w: Tensor | None) -> FlowFunction:
        return with_inputs(self.generator, second=s, w=w)

    def weighted_at(self, t: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return t, t - d


def lagrangian_tangent(
    network: FlowFunction,
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    labels: Tensor | None,
    *,
    sigma_data: float,
    u_at: tuple[Tensor, ...],
    w: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns F; g = -cos(s) sin(s) (df/ds - v(f, s)), without gradient; and u.  [B,C,H,W] twice, [B] each

        df/ds = sin(d) x_t + cos(d) sigma_d F - sin(d) sigma_d dF/ds

    The factor keeps the derivative of c_noise = ln(sigma(s))/4 bounded, as in sCM's rearrangement.

    Args:
        network: takes the second time s.
        velocity: (x_s, s) -> dx_s/ds of the trajectory.  [B,C,H,W]
        u_at: the times of the log variances.  [B] each
    Source: AYF's Lagrangian objective (LMD), derived here for TrigFlow.
    """
    cos, sin = cos_sin(t - s, x_t)
    k = s.cos() * s.sin()
    F, kdF, *u = network(x_t, t, labels, s, along=(torch.zeros_like(x_t), torch.zeros_like(t), k), u_at=u_at, w=w)
    with torch.no_grad():
        x_s = ddim_step(x_t, F, t, s, sigma_data)
        slope = sin * x_t + cos * sigma_data * F - velocity(x_s, s)  # dF/ds comes times k
        residual = expand(k, x_t).to(x_t.dtype) * slope - sin * sigma_data * kdF
    return F, -residual, *u
