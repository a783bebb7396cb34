"""Draws images from seeds, by the sampler that suits the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edmdistill.arguments import checked
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.kernels.winograd import is_frozen
from edmdistill.networks.flow import Denoiser
from edmdistill.networks.inputs import label_vectors
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.heun import Churn
from edmdistill.sampling.seeds import SeededNoise, format_seeds
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.sampling.trajectory import ReferenceGuidance
from edmdistill.threads import ahead, in_crew
from edmdistill.transfer import to_device

CLASS_BATCH = 256
"""Number of seeds for which classes are drawn at a time."""
MOST_CORES = 8
"""With more, threads would wait for Python's lock, and for memory, from which each of them reads all weights."""
LEAST_CHANNELS, LEAST_SIDE = 128, 32
"""Of networks that threads draw by: no published one is smaller. With small ones, threads wait for Python's lock."""
LEAST_USE = 7 / 8
"""Least share of the threads' time in which they draw: the last one may have fewer images."""


@checked
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
    churn: Churn = Churn(),
    reference: ReferenceGuidance | None = None,
    batch: int = 64,
    on_progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draws one image for each seed: from a generator by gamma-sampling, from a teacher by a solver of its ODE.

    A generator that has learned the score, as CTM's have, is sampled as a teacher if a solver is named. An image
    depends on its seed and its label alone, whatever the batch.

    Args:
        model: from load_generator or load_denoiser.
        nfe: network evaluations for an image; default: see SamplerSpec.
        seeds: one for each image, taken modulo 2^32.  [N]
        labels: one class for all, a class a seed [N], vectors [N,label_dim], or None: drawn from each seed.
        gamma: share of fresh noise between a generator's steps, in [0, 1].
        times: noise levels as times in radians, falling, in place of nfe.  [steps]
        guidance, guide, force_guidance, solver, churn, reference: see SamplerSpec.
        batch: images at a time.
        on_progress: called with the number of images that have just been finished.
    Returns: images [N,C,H,W] float32 in [-1, 1], on the CPU; latents undecoded, see sampling.decode.model_decoder.
    Raises: EdmDistillError: an option that does not fit the model.
    """
    spec = SamplerSpec.of_arguments(locals())
    return generate_images(model, spec, seeds, labels, batch=batch, on_progress=on_progress)


@torch.no_grad()
def generate_images(
    model: Generator | Denoiser,
    spec: SamplerSpec,
    seeds: Sequence[int],
    labels: int | Sequence[int] | Tensor | None = None,
    *,
    batch: int = 64,
    on_progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draws one image for each seed, as a spec says.

    An image depends on its seed and its label alone, up to the rounding of the network's own kernels. Noise and classes
    are those that the official EDM and EDM2 scripts draw from that seed on a CPU.

    Args:
        model: keeps its device and precision.
        seeds: one for each image, taken modulo 2^32.  [N]
        labels: one class for all, a class a seed [N], vectors [N,label_dim], or None: drawn from each seed.
        batch: images at a time; see `_threads` for those of large networks on a CPU.
        on_progress: called with the number of images that have just been finished.
    Returns: images [N,C,H,W] float32 in [-1, 1], on the CPU. Latents, of a network that works on those of a VAE (see
        is_latent), are returned as they are, undecoded. An image that holds NaN or infinity is NaN throughout, so that
        clamping hides nothing: see not_finite and require_finite.
    Raises: EdmDistillError: an option that does not fit the model.
    """
    if batch < 1:
        raise EdmDistillError(f"a batch must hold at least 1 image, but it is {batch}")
    sampler = build_sampler(model, spec)
    if not len(seeds):
        raise EdmDistillError("there is nothing to sample: pass at least one seed")
    vectors = None if labels is None else label_vectors(labels, model.flow.label_dim, len(seeds))
    device = model.flow.device

    @torch.no_grad()  # which every thread has for itself
    def draw(rows: range) -> Tensor:
        rng = SeededNoise(seeds[rows.start : rows.stop])
        noise, drawn = _first_draws(model, rng)
        some = drawn if vectors is None else vectors[rows.start : rows.stop]
        given = None if some is None else to_device(some, device)
        x0 = sampler.draw(to_device(noise, device), given, randn_like=rng.like)
        return _to_images(x0, is_latent(model))

    images: list[Tensor] = []
    with in_eval_mode(model, *spec.companions):
        for at in range(0, len(seeds), batch):
            rows = range(at, min(at + batch, len(seeds)))
            threads = _threads(model, spec, len(rows))
            share = -(-len(rows) // max(1, threads))
            shares = [rows[first : first + share] for first in range(0, len(rows), share)]
            images += ahead(draw, shares, threads, share_cores=True)
            if on_progress is not None:
                on_progress(len(rows))
    return torch.cat(images)


def _threads(model: Generator | Denoiser, spec: SamplerSpec, batch: int) -> int:
    """Returns the number of threads of one core each that share a batch; 0: the caller's draws it, with all cores.

    Where the network is large and the shares are equal, threads are faster: they have Winograd's convolution, which is
    for one core.
    """
    flow, cores = model.flow, torch.get_num_threads()
    if not 1 < cores <= MOST_CORES or in_crew() or batch < LEAST_USE * cores * -(-batch // cores):
        return 0
    if flow.network.compiled or spec.reference is not None or torch.is_autocast_enabled("cpu"):
        return 0  # threads must not compile at once; a reference's network is anybody's; autocast is this thread's
    float32 = flow.dtype == torch.float32 and flow.compute_dtype in (None, torch.float32)
    if not (float32 and flow.device.type == "cpu" and is_frozen(flow.network)):
        return 0
    large = flow.network.arguments["model_channels"] >= LEAST_CHANNELS and flow.img_resolution >= LEAST_SIDE
    return cores if large else 0


@contextmanager
def in_eval_mode(*networks: nn.Module | None) -> Iterator[None]:
    """Sets networks to eval mode, and those that were in training mode back to it."""
    training = [network for network in networks if network is not None and network.training]
    try:
        for network in training:
            network.eval()
        yield
    finally:
        for network in training:
            network.train()


def _to_images(x0: Tensor, latent: bool) -> Tensor:
    """Returns a batch on the CPU, in range, and NaN throughout where a number is not finite.  [B,C,H,W]"""
    images = x0.to("cpu", torch.float32)
    broken = not_finite(images)
    images = images if latent else images.clamp(-1, 1)
    images[broken] = float("nan")
    return images


def not_finite(images: Tensor) -> Tensor:
    """Returns which images hold NaN or infinity.  [N,...] -> bool [N]"""
    return ~images.flatten(1).isfinite().all(1)


def require_finite(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Returns the images of these seeds, if all are finite.

    Raises: NotFiniteError: some are not; says how many, and of which seeds.
    """
    broken = not_finite(images)
    if bool(broken.any()):
        raise NotFiniteError(describe_not_finite([seeds[i] for i in broken.nonzero().flatten().tolist()], len(images)))
    return images


def describe_not_finite(seeds: Sequence[int], count: int) -> str:
    """Returns a sentence on images that are not finite, by their seeds, of `count` images."""
    shown = format_seeds(sorted(seeds)[:8]) + (" ..." if len(seeds) > 8 else "")
    every = len(seeds) == count
    advice = (
        "check the weights with edmdistill inspect, and the requested guidance and noise levels"
        if every
        else "try a lower guidance, or float32 where the network runs in half precision"
    )
    verb = "is" if len(seeds) == 1 else "are"
    return f"{len(seeds)} of {count} images {verb} not finite (seeds {shown}): {advice}"


def is_latent(model: Generator | Denoiser) -> bool:
    """Returns whether the network works on the latents of a VAE: so it says, or its images are neither gray nor RGB."""
    return model.encoder["kind"] != "pixels" or model.flow.img_channels not in (1, 3)


def drawn_classes(model: Generator | Denoiser, seeds: Sequence[int]) -> Tensor | None:
    """Returns the classes that `sample` draws for seeds by default; None for an unconditional model.  int64 [N]"""
    if not model.flow.label_dim:
        return None
    groups = (seeds[at : at + CLASS_BATCH] for at in range(0, len(seeds), CLASS_BATCH))
    vectors = (_first_draws(model, SeededNoise(group))[1] for group in groups)
    return torch.cat([rows.argmax(1) for rows in vectors if rows is not None])


def _first_draws(model: Generator | Denoiser, rng: SeededNoise) -> tuple[Tensor, Tensor | None]:
    """Draws unit normal noise [B,C,H,W] and class vectors [B,label_dim], in the order of the official scripts.

    The class is drawn even if the caller gives another, as it is there, so that the churn's noise stays the same.
    """
    flow = model.flow
    noise = rng.normal((flow.img_channels, flow.img_resolution, flow.img_resolution))
    if not flow.label_dim:
        return noise, None
    return noise, label_vectors(rng.integers(flow.label_dim), flow.label_dim, len(noise))
