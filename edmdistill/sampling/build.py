"""From a network and a spec to the sampler that draws from it, and the record of what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.config import default_nfe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, counted
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork, equal_weights
from edmdistill.networks.rounding import rounding_error
from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.sampling.guidance import GuidedDenoiser
from edmdistill.sampling.heun import EDM2_SAMPLER, EDM_SAMPLER, Churn, OfficialSampler
from edmdistill.sampling.spec import MAX_GUIDANCE, SOLVERS, SamplerRecord, SamplerSpec
from edmdistill.sampling.trajectory import ReferenceGuidance, paper_sigmas, reference_sampler
from edmdistill.trigflow import cos_sin, sigma_to_time, time_to_sigma

VISIBLE = 0.05
"""Error of an image in units of sigma_data: about three of 255 levels at EDM's sigma_data of 0.5."""


class Sampler(NamedTuple):
    """A sampler of one network.

    Attributes:
        draw: (noise [B,C,H,W], labels or None, randn_like=...) -> x0 [B,C,H,W].
        record: what it does.
    """

    draw: Callable[..., Tensor]
    record: SamplerRecord


def build_sampler(model: Generator | Denoiser, spec: SamplerSpec) -> Sampler:
    """Returns the sampler of a network that a spec describes, with the network's defaults filled in.

    A generator that has learned the score, as CTM's have, is sampled as a teacher if a solver is named.
    Raises: EdmDistillError: an option that does not fit the network.
    """
    if isinstance(model, Generator) and spec.solver is not None and model.flow.two_time:
        model = Denoiser(model.flow)
    if isinstance(model, Generator) and spec.force_guidance:
        raise EdmDistillError("force_guidance is for teachers, and this is a generator: leave it out")
    if spec.reference is not None:
        sampler = _reference_sampler(model, spec, spec.reference)
    else:
        sampler = _gamma_sampler(model, spec) if isinstance(model, Generator) else _teacher_sampler(model, spec)
    return sampler._replace(record=replace(sampler.record, dtype=_arithmetic(model.flow)))


def _arithmetic(flow: FlowNetwork) -> str:
    """Returns the dtype of the activations by its name, or tf32 where torch may round products of float32 to that."""
    exact = flow.device.type != "cuda" or not torch.backends.cudnn.allow_tf32
    return "tf32" if flow.activation_dtype == torch.float32 and not exact else str(flow.activation_dtype)[6:]


def rounding_warning(model: Generator | Denoiser, spec: SamplerSpec) -> str | None:
    """Returns a warning if rounding spoils the first step, an image from noise, see `rounding_error`; or None.

    A solver's first step is no image, and its later steps correct it.
    """
    record, flow = build_sampler(model, spec).record, model.flow
    if record.sigmas is None or record.solver in SOLVERS:
        return None
    if (error := rounding_error(flow, record.dtype, record.sigmas[0])) < VISIBLE:
        return None
    return (
        f"Warning: the network predicts the noise, whose rounding in {record.dtype} is an error of about {error:.1g} "
        f"sigma_data in images from noise level {record.sigmas[0]:g}: use --dtype float32."
    )


def _gamma_sampler(model: Generator, spec: SamplerSpec) -> Sampler:
    if (spec.guide, spec.solver, spec.churn) != (None, None, Churn()):
        if model.flow.two_time:
            raise EdmDistillError("guide and churn belong to a teacher's solver: name a solver too, or leave them out")
        raise EdmDistillError(
            "guide, solver and churn are for teachers and for generators that read two times, such as CTM's, but this "
            "one reads one: leave them out"
        )
    flow, weight = model.flow, _guidance_weight(model, spec.guidance)
    gamma = model.config.sampling.gamma if spec.gamma is None else spec.gamma
    if spec.times is None:
        times = model.schedule(spec.nfe or default_nfe(model.config))
    else:
        times = torch.as_tensor(spec.times, dtype=torch.float64)
        _check_nfe(spec, len(times))
    jump = partial(model.jump, w=_weight_tensor(flow, weight)) if flow.guided else model.jump
    sigmas = tuple(time_to_sigma(times, flow.sigma_data).tolist())
    return Sampler(
        partial(gamma_sampler, jump, times=times, sigma_data=flow.sigma_data, gamma=gamma),
        SamplerRecord(solver="gamma", nfe=len(sigmas), gamma=gamma, sigmas=sigmas, guidance=weight),
    )


def _teacher_sampler(model: Denoiser, spec: SamplerSpec) -> Sampler:
    if spec.gamma is not None:
        if model.flow.two_time:
            raise EdmDistillError(
                f"gamma is for a generator's jumps, and the solver {spec.solver} makes none: leave out one of the two"
            )
        raise EdmDistillError("gamma is for generators, but this is a teacher: use churn, or leave it out")
    name, weight = spec.solver or "heun", _guidance_weight(model, spec.guidance)
    if spec.guide is not None and weight == 1:
        raise EdmDistillError("a guide has no effect at guidance 1: give another weight, or leave the guide out")
    denoiser = model if weight == 1 else GuidedDenoiser(model, weight, spec.guide, force=spec.force_guidance)
    if spec.guide is not None and equal_weights(model.flow, spec.guide.flow):
        raise EdmDistillError(
            "the guide has the network's own weights, so it has no effect: give another network, or leave the guide "
            "out to guide away from the network without its classes"
        )
    official, solver = official_sampler(model), SOLVERS[name]
    nfe, levels = spec.nfe or solver.nfe(official.num_steps), None
    if spec.times is None:
        sigmas = official.sigmas(denoiser, solver.num_steps(nfe))
    else:
        sigmas = _solver_sigmas(model, spec.times).to(official.dtype)
        levels, nfe = tuple(sigmas[:-1].tolist()), solver.nfe(len(spec.times))
        _check_nfe(spec, nfe)
    if solver.multistep and bool((sigmas.diff() == 0).any()):
        raise EdmDistillError(
            f"the network takes two of the noise levels for one, and {name} looks back at earlier steps, of which none "
            "may be of length 0: use the solver heun, or fewer levels"
        )
    draw = partial(solver.sampler, denoiser, sigmas=sigmas)
    record = SamplerRecord(solver=name, nfe=nfe, sigmas=levels, guidance=weight)
    if name == "heun":
        churn = spec.churn
        if churn != Churn():  # infinity is not JSON
            noise = (churn.strength, churn.sigma_min, min(churn.sigma_max, model.sigma_max), churn.inflation)
            record = replace(record, churn=noise)
        return Sampler(partial(draw, churn=churn, always_draws=official.always_draws), record)
    return Sampler(lambda noise, labels, randn_like: draw(noise, labels), record)


def _solver_sigmas(model: Denoiser, times: Sequence[float] | Tensor) -> Tensor:
    """Returns noise levels for a solver, as the network takes them, followed by 0.  float64 [len(times) + 1]"""
    exact = time_to_sigma(torch.as_tensor(times, dtype=torch.float64), model.flow.sigma_data)
    sigmas = exact.clamp(model.sigma_min, model.sigma_max)
    if not torch.allclose(sigmas, exact, rtol=1e-6, atol=0):  # times are rounded
        raise EdmDistillError(
            f"a solver's noise levels must be the network's, {model.sigma_min:g} to {model.sigma_max:g}, but these are "
            f"{float(exact[0]):.4g} to {float(exact[-1]):.4g}"
        )
    return torch.cat([model.round_sigma(sigmas), sigmas.new_zeros(1)])


def _check_nfe(spec: SamplerSpec, nfe: int) -> None:
    if spec.times is not None and spec.nfe not in (None, nfe):
        raise EdmDistillError(
            f"{counted(len(spec.times), 'noise level')} cannot make {counted(spec.nfe, 'network evaluation')}, but "
            f"{nfe}: leave out one of the two"
        )


def _reference_sampler(model: Generator | Denoiser, spec: SamplerSpec, reference: ReferenceGuidance) -> Sampler:
    if isinstance(model, Denoiser) and spec.guidance is not None:
        raise EdmDistillError("a teacher's guidance has no effect with a reference: leave it out")
    flow, weight, gamma = model.flow, _guidance_weight(model, spec.guidance), spec.gamma or 0.0
    if reference.score is None and isinstance(model, Generator) and not flow.two_time:
        raise EdmDistillError(
            "a reference needs the score, which this generator has not learned: name its teacher as score"
        )
    size = flow.img_channels, flow.img_resolution, flow.img_resolution
    if tuple(reference.image.shape) != size:
        raise EdmDistillError(
            f"the reference is {list(reference.image.shape)}, but the network's images are {list(size)}: resize it"
        )
    sigmas = paper_sigmas(flow.sigma_min, flow.sigma_max)
    if spec.times is not None:
        sigmas = time_to_sigma(torch.as_tensor(spec.times, dtype=torch.float64), flow.sigma_data)
    w = _weight_tensor(flow, weight) if flow.guided else None

    def jump(x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None) -> Tensor:
        t, s = sigma_to_time(sigma, flow.sigma_data), sigma_to_time(sigma_next, flow.sigma_data)
        return flow.jump(cos_sin(t, x)[0] * x, t, s, labels, w) / cos_sin(s, x)[0]

    denoiser, levels = reference.score or Denoiser(flow), tuple(sigmas.tolist())
    draw = partial(reference_sampler, jump, denoiser, reference=reference, sigmas=sigmas, sigma_data=flow.sigma_data)
    nfe = len(levels) + reference.correctors * (len(levels) - 1)
    return Sampler(
        partial(draw, gamma=gamma),
        SamplerRecord(solver="reference", nfe=nfe, gamma=gamma, sigmas=levels, guidance=weight),
    )


def _weight_tensor(flow: FlowNetwork, weight: float) -> Tensor:
    """Returns the weight on the network's device.  []"""
    return torch.full((), weight, device=flow.device)


def _guidance_weight(model: Generator | Denoiser, requested: float | None) -> float:
    """Returns the weight of guidance to sample a network with.

    Raises: EdmDistillError: the network does not support the requested one.
    """
    if isinstance(model, Denoiser):
        weight = 1.0 if requested is None else requested
        if not 0 <= weight <= MAX_GUIDANCE:
            raise EdmDistillError(
                f"the guidance weight must be in [0, {MAX_GUIDANCE:g}], where 1 is none, but it is {weight:g}"
            )
        return weight
    low, high = model.guidance
    weight = low if requested is None else requested
    if not low <= weight <= high:
        supported = f"{low:g} to {high:g}" if low < high else "1 (none) only" if high == 1 else f"{low:g} only"
        raise EdmDistillError(
            f"this generator supports guidance {supported}, but {weight:g} was requested: use a supported one, or none"
        )
    return weight


def official_sampler(teacher: Denoiser) -> OfficialSampler:
    """Returns the settings of the official sampler of a teacher's family."""
    return EDM2_SAMPLER if isinstance(teacher.flow.network, UNet) else EDM_SAMPLER
