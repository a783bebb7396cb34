"""The likelihood of data under a diffusion network, in bits per dimension, by its probability-flow ODE.

The measured density is that of the ODE's distribution: the prior at sigma_max, transported to sigma_min. This requires
the ODE's slope at every noise level, so the network must be a teacher or a generator of two times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset
from edmdistill.data.order import indices
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.evaluate import provenance
from edmdistill.evaluation.images import block_size
from edmdistill.evaluation.pipeline import image_digests, pixels_sha256
from edmdistill.evaluation.protocol import Likelihood, Protocol, Reference
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.rk45 import rk45
from edmdistill.evaluation.shards import batches
from edmdistill.kernels.linear import tf32_allowed
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import IDDPM
from edmdistill.sampling.generate import in_eval_mode
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.sampling.spec import SamplerRecord
from edmdistill.trigflow import cos_sin, sigma_to_time

LIKELIHOOD = Protocol(
    name="nll",
    metrics=("nll", "nll_image_error", "nll_probe_std"),
    features=None,
    seeds=None,
    labels="given",
    uint8=None,
    covariance=None,
)
"""The protocol: all images of the data set; results fill in the rest."""

SOLVER_TOLERANCE = 1e-5
"""Tolerance of the ODE solver, relative and absolute: the error on Gaussian data is below 0.001 bits for each image."""

HALF = 127.5
"""The values of a pixel are 1 / HALF apart in [-1, 1]."""

NoisePrediction = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [b,C,H,W], sigma [b], direction [b,C,H,W], which rows these are [b]) -> the noise n = (x - D(x; sigma)) / sigma,
and its derivative along the direction, [b,C,H,W] each"""


class LogLikelihood(NamedTuple):
    """The natural logarithm of each row's density [B] float64, and the network evaluations of each row [B] int64."""

    value: Tensor
    evaluations: Tensor


def log_likelihood(
    noise: NoisePrediction,
    x: Tensor,
    probe: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    tolerance: float,
    rho: float = 7.0,
) -> LogLikelihood:
    """Returns ln p(x) of points at sigma_min; the steps of the ODE solver adapt to each point.

        dx/dsigma = n(x, sigma),    ln p(x) = ln N(x(sigma_max); 0, sigma_max^2) + integral of div n dsigma

    with div n = probe . (dn/dx probe), whose mean over probes is exact, and sigma = r^rho solved in r.

    Args:
        x: points.  [B,C,H,W]
        probe: random signs, constant along the trajectory.  [B,C,H,W]
        tolerance: relative and absolute, of x and the integral together.
    Source: Song et al. 2021, eq. 39 and 40; Kim et al. 2024 (CTM), appendix D.2, for the solver.
    """
    shape, signs = x.shape[1:], probe.to(torch.float64)

    def slope(r: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        direction = signs[rows]
        n, change = noise(state[:, :-1].reshape(-1, *shape), r**rho, direction, rows)
        divergence = (direction * change).flatten(1).sum(1, keepdim=True)
        return (rho * r ** (rho - 1))[:, None] * torch.cat([n.flatten(1), divergence], 1)

    start = torch.cat([x.to(torch.float64).flatten(1), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)], 1)
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    state, evaluations = rk45(slope, start, *ends, rtol=tolerance, atol=tolerance)
    far, integral = state[:, :-1], state[:, -1]
    prior = -0.5 * (far / sigma_max).square().sum(1) - far.shape[1] * math.log(sigma_max * math.sqrt(2 * math.pi))
    return LogLikelihood(prior + integral, evaluations)


def predict_noise(flow: FlowNetwork, labels: Tensor | None) -> NoisePrediction:
    """Returns the network's estimate of the noise, and its derivative, without the cancellation in x - D.

        n = sin(t) cos(t) x / sigma_data + cos(t) F(cos(t) x, t),    sigma = sigma_data tan(t)

    For a network of two times, F(x, t, t) is the slope of the ODE.

    Args:
        labels: of every row.  [B,label_dim] or None
    """

    def noise(x: Tensor, sigma: Tensor, direction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        t = sigma_to_time(sigma, flow.sigma_data)
        cos, sin = cos_sin(t, x)
        row_labels, second = None if labels is None else labels[rows], t if flow.two_time else None
        F, dF = flow.tangent(cos * x, t, row_labels, cos * direction, torch.zeros_like(t), second)
        turn = sin * cos / flow.sigma_data
        return turn * x + cos * F, turn * direction + cos * dF

    return noise


@torch.no_grad()
def evaluate_likelihood(
    model: Generator | Denoiser,
    data: Dataset,
    *,
    count: int | None = None,
    probes: int = 4,
    tolerance: float = SOLVER_TOLERANCE,
    source: str | None = None,
    raw: bool = False,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Result:
    """Returns the bits per dimension of images under a network; lower is better.

    A value v becomes (v + u) / 127.5 - 1 with u ~ U[-1/2, 1/2), once for an image, and is solved once for each probe.
    Image i draws u and its probes from seed i.

    Args:
        model: a teacher, or a generator of two times; it is measured in evaluation mode.
        count: images, the first in the data set's order of seed 0; default: all.
        probes: random signs for the divergence, at least 1.
        tolerance: see log_likelihood. On digits, 1e-3 errs by 0.01 bits, and 1e-4, at 1.5 times the cost, by 0.0002.
        source, raw: where the network comes from, and whether it has a run's raw weights, for the record.
        on_progress: called with the number of images that have just been measured with one probe.
    Returns: nll, the mean over images and probes; of two images or more nll_image_error, the standard error of that
        mean by the spread of the images; of two probes or more nll_probe_std, the standard deviation of the mean over
        images by one probe.
    Raises:
        EdmDistillError: the generator has no ODE; an iDDPM network, whose noise levels are discrete; or the ODE cannot
            be solved.
        DatasetError: the images or classes do not fit the network.
    Source: see log_likelihood.  Differs: the papers' tolerance is 1e-3, for whole batches. CTM's code measures in
        training mode, mirrors images, ends at sigma 0.41, and has one step size for a batch; the uniform noise is
        centered on the value that the network was trained on.
    """
    flow = model.flow
    _check(model, data)
    order = indices(0, 0, len(data), len(data))[:count].tolist()
    known = Likelihood(
        probes=probes,
        tolerance=tolerance,
        sigma_min=max(0.002, flow.sigma_min),
        sigma_max=min(80.0, flow.sigma_max),
    )
    solve = partial(
        log_likelihood, sigma_min=known.sigma_min, sigma_max=known.sigma_max, tolerance=tolerance, rho=known.rho
    )
    with in_eval_mode(model), tf32_allowed(False):
        bits, evaluations, pixels_hash = _measure(flow, data, order, solve, probes, on_progress)
    values = {"nll": bits.mean()}
    if len(order) > 1:
        values["nll_image_error"] = bits.mean(0).std() / math.sqrt(len(order))
    if probes > 1:
        values["nll_probe_std"] = bits.mean(1).std()
    suffix = "" if len(order) == len(data) else f"@{len(order)}"
    protocol = replace(
        LIKELIHOOD,
        reference=Reference(source=Path(data.name).name, split=data.split, n=len(order), sha256=pixels_hash),
        n=len(order),
        labels="given" if flow.label_dim else "none",
        likelihood=known,
    )
    return Result(
        metrics={name + suffix: float(values[name]) for name in LIKELIHOOD.metrics if name in values},
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="rk45", nfe=round(float(evaluations.double().mean()))),
        provenance=provenance(model, source, flow.device, raw=raw),
    )


def _measure(
    flow: FlowNetwork,
    data: Dataset,
    order: Sequence[int],
    solve: Callable[..., LogLikelihood],
    probes: int,
    on_progress: Callable[[int], object],
) -> tuple[Tensor, Tensor, str]:
    """Returns the bits per dimension [probes,N], the evaluations of each solution [n], and the pixels' sha256."""
    device, digests, bits, evaluations = flow.device, [], [], []
    for rows in batches(range(len(order)), block_size(flow.img_resolution)):
        chosen = order[rows.start : rows.stop]
        pixels = data.images(chosen)
        digests.append(image_digests(pixels))
        labels = data.tensors(chosen)[1] if flow.label_dim else None
        rng = SeededNoise(chosen)
        x = ((pixels + rng.uniform(pixels.shape[1:]) - 0.5) / HALF - 1).to(device)
        noise = predict_noise(flow, None if labels is None else labels.to(device))
        of_batch = []
        for _ in range(probes):
            value, calls = solve(noise, x, rng.signs(pixels.shape[1:]).to(device))
            of_batch.append(math.log2(HALF) - value.cpu() / (x[0].numel() * math.log(2)))
            evaluations.append(calls.cpu())
            on_progress(len(rows))
        bits.append(torch.stack(of_batch))
    return torch.cat(bits, 1), torch.cat(evaluations), pixels_sha256(data.size, torch.cat(digests))


def _check(model: Generator | Denoiser, data: Dataset) -> None:
    """Makes the data use the network's classes.  Raises: EdmDistillError: the network has no ODE for such data."""
    flow = model.flow
    if isinstance(model, Generator) and not flow.two_time:
        raise EdmDistillError(
            "this generator only jumps to the data and has no ODE, so it has no likelihood: measure "
            "its teacher, or a generator of ctm or fmd"
        )
    if isinstance(flow.preconditioning, IDDPM):
        raise EdmDistillError(
            "an iDDPM network has discrete noise levels, so its ODE cannot be solved with adaptive steps: "
            "measure a network with EDM, VP or VE preconditioning"
        )
    size, ours = (flow.img_channels, flow.img_resolution), (data.img_channels, data.img_resolution)
    if size != ours:
        raise DatasetError(
            f"the images of {data.name} are {ours[0]}x{ours[1]}x{ours[1]} (channels, height, width), but the network's "
            f"are {size[0]}x{size[1]}x{size[1]}: use the data that it was trained on"
        )
    data.use_classes(flow.label_dim)
