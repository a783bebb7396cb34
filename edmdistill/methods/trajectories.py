"""Regression on the teacher's trajectories: jumps from their points learn to reach their end, or a later point.

A trajectory of K steps costs K evaluations of the teacher and teaches K jumps, one from each of its levels.

Source: Yin et al. 2024 (DMD), section 3.3, whose regression loss is on pairs of noise and image.  Differs: jumps start
at every point, not at the noise alone; the error is squared in F, not LPIPS; pairs are made when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, NoiseRange
from edmdistill.methods.solver import multistep_trajectory
from edmdistill.schedules import edm_curve
from edmdistill.trigflow import ddim_flow, diffuse, sigma_to_time

TrajectorySteps = Annotated[
    int, Meta(ge=0, le=1000, description="steps of the teacher's trajectories that jumps are learned from; 0 = none")
]
TrajectoryStride = Annotated[
    int, Meta(ge=1, le=1000, description="jumps start at every n-th point of a trajectory; 1 = at all of them")
]
TrajectoryWeight = Annotated[float, Meta(gt=0, description="weight of trajectories beside the method's own loss")]
WarmupImages = Annotated[
    int, Meta(ge=0, description="images learned by trajectories alone, before the other losses begin")
]


def trajectory_loss(
    generator: Callable[..., Tensor],
    teacher: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    batch: Batch,
    draws: Draws,
    noise: NoiseRange,
    *,
    steps: int,
    share_to_max: float,
    stride: int = 1,
    share_to_end: float | None = None,
) -> Loss:
    """Returns the mean of |F(x_t, t) - F_s|^2 over the points of trajectories, where F_s leads to s.  [B]

    A trajectory starts from x_t ~ p(x_t | x0), at r = 1 of EDM's curve with probability share_to_max, else at
    r ~ U[0, 1]. Its points are at r (1 - k / steps), k = 0 ... steps - 1.

    Args:
        generator: (x_t, t, labels) -> F; or (x_t, t, labels, s), see share_to_end.
        stride: jumps start at k = 0, stride, 2 stride ..., so that a finer trajectory needs no more jumps.
        share_to_end: share of jumps to the end, s = 0; the others lead to any later point or the end with equal
            probability. The generator then reads s too. None: all jumps lead to the end, and it reads t alone.
    """
    sigma_data, sigma_min, sigma_max = noise
    r = torch.where(draws.uniform() < share_to_max, 1.0, draws.uniform())
    fractions = 1 - torch.arange(steps, dtype=torch.float64, device=r.device)[:, None] / steps
    times = sigma_to_time(edm_curve(fractions * r, sigma_min, sigma_max), sigma_data)
    with torch.no_grad():
        start = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), times[0])
        points, end = multistep_trajectory(lambda x, t: teacher(x, t, batch.labels), start, times, sigma_data)
    k = stride * torch.arange(steps // stride, device=r.device)[:, None].expand(-1, len(r))
    stop = torch.full_like(k, steps)
    if share_to_end is not None:
        to_end, later = draws.uniform(2, len(k)).permute(1, 2, 0)
        stop = torch.where(to_end < share_to_end, stop, k + 1 + (later * (steps - k)).long())
    rows = torch.arange(len(r), device=r.device)
    path, path_times = torch.stack([*points, end]), torch.cat([times, torch.zeros_like(times[:1])])
    (x_t, t), (x_s, s) = ((path[i, rows].flatten(0, 1), path_times[i, rows].flatten()) for i in (k, stop))
    labels = None if batch.labels is None else batch.labels.repeat(len(k), 1)
    F_s = ddim_flow(x_t, x_s, t, s, sigma_data)
    error = (generator(x_t, t, labels) if share_to_end is None else generator(x_t, t, labels, s)) - F_s
    value = error.square().flatten(1).sum(1).reshape(len(k), -1).mean(0)
    return Loss(value, times[0], {"trajectory_error": error.detach().square().mean()})
