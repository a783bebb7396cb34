"""From seeds to images, by whichever sampler the model wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.dpm_solver import ddim_sampler, dpm_solver_2s, dpm_solver_pp_2m
from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.sampling.guidance import GuidedDenoiser
from edmdistill.sampling.heun import EDM, EDM2, Churn, Style, edm_sampler, steps_of_nfe
from edmdistill.sampling.labels import label_vectors
from edmdistill.sampling.seeds import SeededNoise, format_seeds
from edmdistill.sampling.times import check_times
from edmdistill.sampling.trajectory import Towards, paper_sigmas, reference_sampler
from edmdistill.trigflow import cos_sin, sigma_to_time, time_to_sigma

NO_CHURN = Churn()
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "heun": edm_sampler,
    "ddim": ddim_sampler,
    "dpm-solver-2s": dpm_solver_2s,
    "dpm-solver++2m": dpm_solver_pp_2m,
}
"""How teachers are sampled, by the names that users type."""
ONE_CALL_A_STEP = "ddim", "dpm-solver++2m"
MAX_NFE = 10_000
"""More evaluations than any schedule has a use for; a mistyped number would fill the memory with noise levels."""
MAX_GUIDANCE = 1000.0
CLASS_BATCH = 256
"""Seeds at a time whose classes are drawn."""


@torch.no_grad()
def sample(
    model: Generator | Denoiser,
    nfe: int | None = None,
    *,
    seeds: Sequence[int],
    labels: int | Sequence[int] | Tensor | None = None,
    gamma: float | None = None,
    times: Sequence[float] | Tensor | None = None,
    guidance: float | None = None,
    guide: Denoiser | None = None,
    force_guidance: bool = False,
    solver: str | None = None,
    churn: Churn = NO_CHURN,
    towards: Towards | None = None,
    batch: int = 64,
    on_progress: Callable[[int], object] | None = None,
) -> Tensor:
    """One image for each seed: a generator's by gamma-sampling, a teacher's by a solver of its ODE.

    A generator that knows the score, as CTM's do, is a teacher too if a solver is named.

    An image depends on its seed and its label alone, up to the rounding of the network's own kernels. Noise and classes
    are those that the official EDM and EDM2 scripts draw from that seed on a CPU.

    Args:
        model: it stays where it is and in the precision that it has.
        nfe: network evaluations for an image; default: 2 for a generator, 35 for a teacher, 63 for one of EDM2. By a
            solver of two evaluations a step it is odd; guidance, which calls a second network, does not count.
        seeds: one for each image, taken modulo 2^32.  [N]
        labels: one class for all, a class a seed [N], vectors [N,label_dim], or None: drawn from each seed.
        gamma: share of fresh noise between a generator's steps, in [0, 1]; default: its own; see gamma_sampler.
        times: a generator's times in radians, falling; default: its own schedule for nfe steps.  [nfe]
        guidance: weight of a teacher's guidance, see GuidedDenoiser; of a generator's, one in the range that it has
            learnt. 1 = none, 0 = the guide alone, at most 1000; default: 1, or the least that a generator knows.
        guide: the network to move away from; default: the teacher without labels, if part of its training was.
        force_guidance: let a teacher guide itself that was never trained without labels.
        solver: a teacher's or CTM generator's, of SOLVERS; default for a teacher: heun.
        churn: fresh noise on a teacher's way by Heun's method; see Churn.
        towards: a reference image, from which every image starts, and to which it is pulled, by teacher or generator,
            at times and with a gamma of below 1 as a generator's; default: paper_sigmas and 0; see reference_sampler.
        batch: images at a time.
        on_progress: called with the number of images that have just been finished.
    Returns: images [N,C,H,W] float32 in [-1, 1], on the CPU. Of a network that works on the latents of a VAE (see
        is_latent): those latents as they are, for decoding is not done here. An image that holds NaN or infinity is NaN
        throughout, so that clamping hides nothing: see not_finite and require_finite.
    Raises: EdmDistillError: an option that does not fit the model, is out of range, or is not finite.
    """
    if nfe is not None and not 1 <= nfe <= MAX_NFE:
        raise EdmDistillError(f"the number of network evaluations lies between 1 and {MAX_NFE:,}, but it is {nfe:,}")
    if batch < 1:
        raise EdmDistillError(f"a batch holds at least 1 image, but it is {batch}")
    if isinstance(model, Generator) and solver is not None and model.flow.two_time:
        model = Denoiser(model.flow)
    if towards is not None:
        told = guidance is not None and isinstance(model, Denoiser)
        if nfe is not None or told or guide is not None or solver is not None or churn != NO_CHURN:
            raise EdmDistillError(
                "nfe, solver, churn and a teacher's guidance play no part on the way to a reference: leave them out"
            )
        solve = _reference_solver(model, towards, gamma, times, guidance_of(model, guidance))
    elif isinstance(model, Generator):
        if guide is not None or solver is not None or churn != NO_CHURN:
            raise EdmDistillError(
                "guide, solver and churn are for teachers and CTM's generators, and this is another: leave them out"
            )
        solve = _gamma_solver(model, nfe, gamma, times, guidance_of(model, guidance))
    else:
        if gamma is not None or times is not None:
            raise EdmDistillError(
                "gamma and times are for generators, and this is a teacher: use nfe, guidance and churn"
            )
        weight = guidance_of(model, guidance)
        denoiser = model if weight == 1 else GuidedDenoiser(model, weight, guide, force=force_guidance)
        solve = _teacher_solver(model, denoiser, nfe, guide is not None, solver or "heun", churn)
    if force_guidance and (isinstance(model, Generator) or guide is not None or guidance in (None, 1)):
        raise EdmDistillError(
            "force_guidance lets a teacher guide itself at a guidance other than 1, and here nothing is guided so: "
            "leave it out"
        )
    if not len(seeds):
        raise EdmDistillError("there is nothing to sample: give at least one seed")
    flow = model.flow
    vectors = None if labels is None else label_vectors(labels, flow.label_dim, len(seeds))
    device = next(flow.parameters()).device
    score = None if towards is None else towards.score
    trained = [network for network in (model, guide, score) if network is not None and network.training]
    images = []
    try:
        for network in trained:
            network.eval()
        for at in range(0, len(seeds), batch):
            rng = SeededNoise(seeds[at : at + batch])
            noise, drawn = _first_draws(model, rng)
            chosen = drawn if vectors is None else vectors[at : at + batch]
            x0 = solve(noise.to(device), None if chosen is None else chosen.to(device), randn_like=rng.like)
            images.append(_finished(x0, is_latent(model)))
            if on_progress is not None:
                on_progress(len(noise))
    finally:
        for network in trained:
            network.train()
    return torch.cat(images)


def _finished(x0: Tensor, latent: bool) -> Tensor:
    """A batch as it is returned: on the CPU, in range, NaN throughout where a number is not finite.  [B,C,H,W]"""
    images = x0.to("cpu", torch.float32)
    broken = not_finite(images)
    images = images if latent else images.clamp(-1, 1)
    images[broken] = float("nan")
    return images


def not_finite(images: Tensor) -> Tensor:
    """Which images hold NaN or infinity.  [N,...] -> bool [N]"""
    return ~images.flatten(1).isfinite().all(1)


def require_finite(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Returns the images, of these seeds, if all are finite.

    Raises: NotFiniteError: how many are not, and of which seeds.
    """
    broken = not_finite(images)
    if bool(broken.any()):
        raise NotFiniteError(describe_not_finite([seeds[i] for i in broken.nonzero().flatten().tolist()], len(images)))
    return images


def describe_not_finite(seeds: Sequence[int], count: int) -> str:
    """The sentence on images that are not finite: their seeds, of `count` images."""
    shown = format_seeds(sorted(seeds)[:8]) + (" ..." if len(seeds) > 8 else "")
    every = len(seeds) == count
    advice = (
        "check the weights with edmdistill inspect, and the guidance and noise levels that were asked for"
        if every
        else "try a lower guidance, or --dtype float32 where the network runs in half precision"
    )
    verb = "is" if len(seeds) == 1 else "are"
    return f"{len(seeds)} of {count} images {verb} not finite (seeds {shown}): {advice}"


def is_latent(model: Generator | Denoiser) -> bool:
    """Whether the network works on the latents of a VAE: neither gray nor RGB."""
    return model.flow.img_channels not in (1, 3)


def style_of(teacher: Denoiser) -> Style:
    """The official sampler that a teacher belongs to."""
    return EDM2 if isinstance(teacher.flow.network, UNet) else EDM


def drawn_classes(model: Generator | Denoiser, seeds: Sequence[int]) -> Tensor | None:
    """The classes that `sample` draws for these seeds if it is given none; None if there are none.  int64 [N]"""
    if not model.flow.label_dim:
        return None
    groups = (seeds[at : at + CLASS_BATCH] for at in range(0, len(seeds), CLASS_BATCH))
    vectors = (_first_draws(model, SeededNoise(group))[1] for group in groups)
    return torch.cat([part.argmax(1) for part in vectors if part is not None])


def _first_draws(model: Generator | Denoiser, rng: SeededNoise) -> tuple[Tensor, Tensor | None]:
    """Unit normal noise [B,C,H,W] and class vectors [B,label_dim], in the order of the official scripts.

    The class is drawn even where the caller names another, as it is there, so that the churn's noise stays the same.
    """
    flow = model.flow
    noise = rng.normal((flow.img_channels, flow.img_resolution, flow.img_resolution))
    if not flow.label_dim:
        return noise, None
    return noise, label_vectors(rng.integers(flow.label_dim), flow.label_dim, len(noise))


def guidance_of(model: Generator | Denoiser, asked: float | None) -> float:
    """The weight of guidance that `sample` draws with.

    Raises: EdmDistillError: a generator does not know it.
    """
    if isinstance(model, Denoiser):
        if asked is not None and not 0 <= asked <= MAX_GUIDANCE:
            raise EdmDistillError(
                f"the weight of guidance lies in [0, {MAX_GUIDANCE:g}], where 1 is none, but it is {asked:g}"
            )
        return 1.0 if asked is None else asked
    low, high = model.guidance
    weight = low if asked is None else asked
    if not low <= weight <= high:
        known = f"{low:g} to {high:g}," if low < high else "1, which is none," if high == 1 else f"{low:g} alone,"
        raise EdmDistillError(
            f"this generator knows guidance {known} but {weight:g} was asked for: ask for another, or for none"
        )
    return weight


def _gamma_solver(
    model: Generator, nfe: int | None, gamma: float | None, times: Sequence[float] | Tensor | None, guidance: float
) -> Callable[..., Tensor]:
    gamma = model.config.sampling.gamma if gamma is None else gamma
    if not 0 <= gamma <= 1:
        raise EdmDistillError(f"gamma is the share of fresh noise and lies in [0, 1], but it is {gamma:g}")
    if times is None:
        nfe = 2 if nfe is None else nfe
        if nfe < 1:
            raise EdmDistillError(f"a generator needs at least 1 network evaluation, but {nfe} were asked for")
        times = model.schedule(nfe)
    jump = partial(model.jump, w=torch.tensor(guidance)) if model.flow.guided else model.jump
    times = check_times(times, nfe)
    return partial(gamma_sampler, jump, times=times, sigma_data=model.flow.sigma_data, gamma=gamma)


def _reference_solver(
    model: Generator | Denoiser,
    towards: Towards,
    gamma: float | None,
    times: Sequence[float] | Tensor | None,
    guidance: float,
) -> Callable[..., Tensor]:
    flow, gamma = model.flow, gamma or 0.0
    if not 0 <= gamma < 1:
        raise EdmDistillError(f"on the way to a reference, gamma lies in [0, 1), but it is {gamma:g}")
    if towards.score is None and isinstance(model, Generator) and not flow.two_time:
        raise EdmDistillError(
            "this generator jumps to the data alone and knows no score to correct its way by: name its teacher as score"
        )
    size = flow.img_channels, flow.img_resolution, flow.img_resolution
    if tuple(towards.reference.shape) != size:
        raise EdmDistillError(
            f"the reference is {list(towards.reference.shape)}, but the network's images are {list(size)}"
        )
    sigmas = paper_sigmas(flow.sigma_min, flow.sigma_max)
    if times is not None:
        sigmas = time_to_sigma(check_times(times), flow.sigma_data)

    w = torch.tensor(guidance) if flow.guided else None

    def jump(x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None) -> Tensor:
        t, s = sigma_to_time(sigma, flow.sigma_data), sigma_to_time(sigma_next, flow.sigma_data)
        return flow.jump(cos_sin(t, x)[0] * x, t, s, labels, w) / cos_sin(s, x)[0]

    known = towards.score or Denoiser(flow)
    return partial(
        reference_sampler, jump, known, towards=towards, sigmas=sigmas, sigma_data=flow.sigma_data, gamma=gamma
    )


def default_nfe(teacher: Denoiser, solver: str = "heun") -> int:
    """The network evaluations of as many steps as the official sampler takes."""
    steps = style_of(teacher).num_steps
    return steps if solver in ONE_CALL_A_STEP else 2 * steps - 1


def _teacher_solver(
    model: Denoiser,
    denoiser: Denoiser | GuidedDenoiser,
    nfe: int | None,
    has_guide: bool,
    solver: str,
    churn: Churn,
) -> Callable[..., Tensor]:
    if solver not in SOLVERS:
        raise EdmDistillError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if has_guide and denoiser is model:
        raise EdmDistillError("a guide does nothing at guidance 1, which means none: give another weight, or no guide")
    nfe = nfe or default_nfe(model, solver)
    num_steps = nfe if solver in ONE_CALL_A_STEP else steps_of_nfe(nfe)
    solve = partial(SOLVERS[solver], denoiser, style=style_of(model), num_steps=num_steps)
    if solver == "heun":
        return partial(solve, churn=churn)
    if churn != NO_CHURN:
        raise EdmDistillError(f"churn is part of Heun's method, and {solver} has none: leave out one of the two")
    return lambda noise, labels, randn_like: solve(noise, labels)
