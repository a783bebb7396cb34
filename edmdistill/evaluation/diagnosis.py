"""Where a generator is weak: single jumps from real images by noise level, and what its auxiliary score makes of them.

A generator is sampled in a chain of jumps, so a bad image does not say which jump was bad. Here each starts from real
images with noise, x_t = cos(t) x0 + sin(t) z, whatever came before it in a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.checkpoints.load import load_flow, read_teacher
from edmdistill.checkpoints.run_state import newest_whole_state, raw_weights
from edmdistill.checkpoints.source import open_source
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.fit import require_fit
from edmdistill.data.latents import draw_latents
from edmdistill.data.order import indices
from edmdistill.draws import Draws
from edmdistill.errors import CheckpointError, DatasetError, EdmDistillError, NotFiniteError
from edmdistill.evaluation.checks import require_size
from edmdistill.evaluation.collect import real_statistics
from edmdistill.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance
from edmdistill.evaluation.protocol import get_protocol, open_reference
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.evaluation.shards import batches
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import load_features
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.progress import write
from edmdistill.sampling.decode import Decoder, LatentDecoder, open_decoder
from edmdistill.sampling.generate import not_finite
from edmdistill.sampling.grid import to_uint8
from edmdistill.trigflow import denoised, diffuse, sigma_to_time

JUMP_SIGMAS = (80.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.17, 0.08)
"""Noise levels of the jumps: sparse at the top, where a jump is nearly one from noise, and dense in the middle."""
GAP_SIGMAS = (0.03, 0.1, 0.3, 1.0)
"""Noise levels s at which the two scores are compared, of jumps from the levels t above them."""
COUNT = 3000
"""Number of jumps from each level: images of the data in random order, again with other noise if they are fewer."""
WEAK_RATIO = 1.25
"""A jump is called weak if its distance is so many times that of the teacher's denoiser."""
LOW_SENSITIVITY = 0.15
"""An auxiliary score is said to ignore t if its gap changes by less than this share between t and t_max."""


class SingleJump(NamedTuple):
    """Frechet distance to the data of one jump from real x_t, by the generator and by the teacher's denoiser."""

    sigma: float
    generator: float
    teacher: float | None = None


class Gap(NamedTuple):
    """The score gap u = sigma_d (F_psi - F*) at s of jumps from t.

    Attributes:
        gap: its root mean square.
        sensitivity: |u(t) - u(t_max)| / |u(t)|, what the auxiliary score makes of its second time at the same x_s.
    """

    sigma_s: float
    sigma_t: float
    gap: float
    sensitivity: float


class Diagnosis(NamedTuple):
    jumps: list[SingleJump]
    gaps: list[Gap]

    def measures(self) -> dict[str, float]:
        """Returns the numbers by name: jump/generator/SIGMA, jump/teacher/SIGMA, gap/S/T, gap_sensitivity/S/T."""
        numbers = {f"jump/generator/{jump.sigma:g}": jump.generator for jump in self.jumps}
        numbers |= {f"jump/teacher/{jump.sigma:g}": jump.teacher for jump in self.jumps if jump.teacher is not None}
        for s, t, gap, sensitivity in self.gaps:
            numbers |= {f"gap/{s:g}/{t:g}": gap, f"gap_sensitivity/{s:g}/{t:g}": sensitivity}
        return numbers


def read_measures(line: Mapping[str, float]) -> Diagnosis:
    """Returns the diagnosis whose `measures` are in a line of metrics; empty if there are none."""
    named = {name: name.split("/")[1:] for name in line if name.startswith(("jump/generator/", "gap/"))}
    jumps = [
        SingleJump(float(sigma), line[name], line.get(f"jump/teacher/{sigma}"))
        for name, (first, sigma) in named.items()
        if first == "generator"
    ]
    gaps = [
        Gap(float(s), float(t), line[name], line[f"gap_sensitivity/{s}/{t}"])
        for name, (s, t) in named.items()
        if s != "generator"
    ]
    return Diagnosis(jumps, gaps)


def diagnose(
    source: str | Path,
    *,
    protocol: str,
    teacher: str | Path | None = None,
    reference: str | Path | None = None,
    data: str | Path | None = None,
    vae: str | None = None,
    weights: Mapping[str, str | Path] = {},
    count: int = COUNT,
    device: torch.device | str = "cpu",
    batch: int = 250,
) -> Diagnosis:
    """Returns how good single jumps of a generator are, and, of a run with an auxiliary score, its gaps.

    Args:
        source: a generator, or a run directory.
        teacher: what it was distilled from; None: it is not compared, and there are no gaps.
        protocol, reference: give features and real images, as in `evaluate`.
        data: what jumps start from, a data set; None: the reference, if it holds what the network makes.
        vae: what decodes a network's latents, see `open_decoder`.
        weights: the file of the feature space by its name, as in `evaluate`.
        count: number of jumps from each level; a tenth as many for the gaps.
    Raises:
        CheckpointError: it is no generator, or cannot be read; or the VAE cannot.
        DatasetError: the data do not fit.
        EdmDistillError: weights of another feature space.
        NotFiniteError: a jump or a gap is NaN or infinite.
    """
    standard = get_protocol(protocol)
    flow, config = load_flow(source)
    if config.stage != "generator":
        raise CheckpointError(f"{source} is a teacher, not a generator: give a run, or its generator")
    real = open_reference(reference, standard)
    if data is None and (config.latent or not isinstance(real, Dataset)):
        kind = "latents" if config.latent else "images"
        held = "holds images" if isinstance(real, Dataset) else "holds statistics"
        if not isinstance(real, Dataset) and real.has_images:
            held = "is an .npz of images"
        name = reference or f"the reference of {protocol}"
        raise DatasetError(
            f"{name} {held}, and jumps start from a data set of {kind}: name its zip or folder with --data"
        )
    start = real if data is None else open_dataset(data)
    assert isinstance(start, Dataset)
    assert standard.features is not None
    if others := weights.keys() - {standard.features}:
        raise EdmDistillError(
            f"weights of {min(others)} were given, but {protocol} compares images in {standard.features}: leave "
            "them out, or give that one's"
        )
    teacher_flow = None if teacher is None else read_teacher(teacher)[0]
    auxiliary = None if teacher_flow is None else _read_auxiliary(open_source(source).path, teacher_flow)
    for network in filter(None, (flow, teacher_flow, auxiliary)):
        require_fit(start, network, config)
        network.to(device).eval().network.fold()
    space, decode = (
        load_features(standard.features, weights.get(standard.features), device),
        open_decoder(config.encoder, vae, device),
    )
    size = flow.img_channels, flow.img_resolution, flow.img_resolution
    require_size(tuple(decode(torch.zeros(1, *size, device=device)).shape[1:]), real)
    return diagnose_networks(
        flow, teacher_flow, auxiliary, start, space, reference=real, decode=decode, count=count, batch=batch
    )


def diagnose_networks(
    generator: FlowNetwork,
    teacher: FlowNetwork | None,
    auxiliary: FlowNetwork | None,
    data: Dataset,
    space: FeatureSpace,
    *,
    reference: Dataset | ReferenceStatistics | None = None,
    decode: Decoder = to_uint8,
    teacher_jumps: Sequence[float] | None = None,
    count: int = COUNT,
    batch: int = 250,
    on_batch: Callable[[], object] = lambda: None,
) -> Diagnosis:
    """Returns the diagnosis of networks in evaluation mode.

    Args:
        teacher, auxiliary: the two scores, between which gaps are measured; None: there is no such network.
        data: what jumps start from, images or latents.
        reference: the real images that they are compared with; None: the data.
        decode: makes pictures of what the networks make.
        teacher_jumps: the teacher's jump_distances, where they are known.
        count: as for `diagnose`.
        on_batch: called before every batch of images.
    Raises: NotFiniteError: a jump or a gap is NaN or infinite.
    """

    real = real_statistics(data if reference is None else reference, space, batch, on_batch)

    def distances(flow: FlowNetwork) -> list[float]:
        return jump_distances(flow, data, space, real=real, decode=decode, count=count, batch=batch, on_batch=on_batch)

    beside: Sequence[float | None] = [None] * len(JUMP_SIGMAS)
    if teacher is not None:
        beside = teacher_jumps or distances(teacher)
    jumps = [SingleJump(*row) for row in zip(JUMP_SIGMAS, distances(generator), beside, strict=True)]
    if teacher is None or auxiliary is None:
        return Diagnosis(jumps, [])
    fewer = max(count // 10, 1)
    gaps = score_gaps(generator, teacher, auxiliary, data, decode=decode, count=fewer, batch=batch, on_batch=on_batch)
    return Diagnosis(jumps, gaps)


@torch.no_grad()
def jump_distances(
    flow: FlowNetwork,
    data: Dataset,
    space: FeatureSpace,
    sigmas: Sequence[float] = JUMP_SIGMAS,
    *,
    real: GaussianStatistics | None = None,
    decode: Decoder = to_uint8,
    count: int = COUNT,
    batch: int = 250,
    on_batch: Callable[[], object] = lambda: None,
) -> list[float]:
    """Returns the Frechet distance between real images and one jump to them from each noise level.

    Args:
        flow: a generator or a denoiser; of two times, its jumps end at 0.
        real: of real images; None: of all the data.
        decode: as for `diagnose_networks`.
        count: number of jumps; more than there are images: each again, with other noise.
        on_batch: as for `diagnose_networks`.
    Raises: NotFiniteError: an image is NaN or infinite.
    """
    real = real or real_statistics(data, space, batch, on_batch)
    generated = [RunningStatistics() for _ in sigmas]
    broken = torch.zeros(len(sigmas), dtype=torch.int64, device=flow.device)
    for x0, labels, draws in _images(flow, data, count, batch, decode):
        on_batch()
        z = draws.normal_like(x0, flow.sigma_data)
        for i, (sigma, running) in enumerate(zip(sigmas, generated, strict=True)):
            t = sigma_to_time(sigma, flow.sigma_data).to(x0.device)
            images = flow.jump(diffuse(x0, z, t), t, torch.zeros_like(t), labels)
            broken[i] += not_finite(images).sum()
            running.update(space(decode(images.nan_to_num())))
    if worst := int(broken.max()):
        raise NotFiniteError(
            f"{worst} of {count} images of a jump from sigma {sigmas[int(broken.argmax())]:g} are not finite: check "
            "the weights with edmdistill inspect"
        )
    return [frechet_distance(running.finish(), real) for running in generated]


@torch.no_grad()
def score_gaps(
    generator: FlowNetwork,
    teacher: FlowNetwork,
    auxiliary: FlowNetwork,
    data: Dataset,
    *,
    sigmas_s: Sequence[float] = GAP_SIGMAS,
    sigmas_t: Sequence[float] = JUMP_SIGMAS,
    decode: Decoder = to_uint8,
    count: int = COUNT // 10,
    batch: int = 250,
    on_batch: Callable[[], object] = lambda: None,
) -> list[Gap]:
    """Returns the gap between the two scores of a generator by (s, t), s < t, on the data with fixed noise.

    Args:
        auxiliary: reads (x_s; s, t), or x_s and s alone: then its sensitivity is 0.
        decode, on_batch: as for `diagnose_networks`.
    Raises: NotFiniteError: a gap is NaN or infinite.
    """
    pairs = [(s, t) for s in sigmas_s for t in sigmas_t if s < t]
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
    sigma_data, last = generator.sigma_data, sigma_to_time(generator.sigma_max, generator.sigma_data)
    for x0, labels, draws in _images(generator, data, count, batch, decode):
        on_batch()
        z, z_s = draws.normal_like(x0, sigma_data), draws.normal_like(x0, sigma_data)
        classes = None if labels is None else labels.to(teacher.device)  # an average may be in the host's memory

        def gap(x_s: Tensor, s: Tensor, t: Tensor, classes: Tensor | None = classes) -> Tensor:
            second = t if auxiliary.two_time else None
            difference: Tensor = auxiliary(x_s, s, classes, second) - teacher(x_s, s, classes)
            return sigma_data * difference

        for row, pair in zip(sums, pairs, strict=True):
            s, t = (sigma_to_time(sigma, sigma_data).to(x0.device) for sigma in pair)
            x_t = diffuse(x0, z, t)
            x_s = diffuse(denoised(x_t, generator(x_t, t, labels), t, sigma_data), z_s, s).to(teacher.device)
            u = gap(x_s, s, t)
            row += torch.stack([v.double().square().mean((1, 2, 3)).sum() for v in (u, u - gap(x_s, s, last))]).cpu()
    rms = (sums / count).sqrt().tolist()
    if bad := [pair for pair, (size, _) in zip(pairs, rms, strict=True) if not math.isfinite(size)]:
        low, high = bad[0]
        raise NotFiniteError(
            f"the score gap at sigma {low:g} of jumps from sigma {high:g} is not finite: check the weights of the "
            "auxiliary score and of the teacher with edmdistill inspect"
        )
    return [Gap(*pair, size, change / max(size, 1e-12)) for pair, (size, change) in zip(pairs, rms, strict=True)]


def _images(
    flow: FlowNetwork, data: Dataset, count: int, batch: int, decode: Decoder = to_uint8
) -> Iterator[tuple[Tensor, Tensor | None, Draws]]:
    """Yields `count` images and labels on the network's device, with random numbers that depend on their place alone.

    They are shuffled, because images are often sorted by class. Latents are drawn, and scaled as the network takes
    them.
    """
    device = flow.device
    for rows in batches(range(count), batch):
        x0, labels = data.tensors(indices(0, rows.start, len(rows), len(data)))
        draws = Draws(0, rows.stop, slice(rows.start, rows.stop), device)
        x0 = x0.to(device)
        if isinstance(decode, LatentDecoder):
            x0 = draw_latents(x0, draws.normal_like(x0.chunk(2, dim=1)[0]), decode.encoder)
        yield x0, None if labels is None else labels.to(device), draws


def _read_auxiliary(folder: Path, teacher: FlowNetwork) -> FlowNetwork | None:
    """Returns the auxiliary score in a run's newest state; None: there is no state, or no such role.

    Raises: CheckpointError: the run has another teacher.
    """
    if not (folder / "state").is_dir():
        return None
    state = newest_whole_state(folder, write)
    if not (state / "auxiliary.safetensors").is_file():
        return None
    optional = "logvar_", "head."
    weights = {name: w for name, w in raw_weights(state, "auxiliary").items() if not name.startswith(optional)}
    two_time = any(name.startswith("second_time.") for name in weights)
    auxiliary = (add_second_time if two_time else drop_second_time)(teacher)
    shapes = {name: w.shape for name, w in auxiliary.network.state_dict().items() if not name.startswith("logvar_")}
    if shapes != {name: w.shape for name, w in weights.items()}:
        raise CheckpointError(f"{folder} was distilled from another teacher than the one given: name its own")
    auxiliary.network.load_state_dict(weights, strict=False)
    return auxiliary


def sentences(diagnosis: Diagnosis) -> list[str]:
    """Returns where the generator is weak, and what its auxiliary score says of it."""
    return [*_on_jumps(diagnosis.jumps), *_on_gaps(diagnosis.gaps)]


def _on_jumps(jumps: Sequence[SingleJump]) -> list[str]:
    best, worst = (pick(jumps, key=lambda jump: jump.generator) for pick in (min, max))
    lines = [
        f"A jump is best from sigma {best.sigma:g}, with a distance of {best.generator:.3g}, and worst from sigma "
        f"{worst.sigma:g}, with {worst.generator:.3g}."
    ]
    rising = [below.sigma for above, below in pairwise(jumps) if below.generator > above.generator]
    if rising:
        lines.append(
            f"At sigma {_listed(rising)} a shorter jump is worse than the longer one before it: as the last of several "
            "steps these levels make the images worse."
        )
    weak = [jump.sigma for jump in jumps if jump.teacher is not None and jump.generator > WEAK_RATIO * jump.teacher]
    if weak:
        lines.append(
            f"At sigma {_listed(weak)} a jump is worse than the teacher's denoiser, from which the generator started: "
            "training has done harm there. A lower learning rate helps; with a score's gradient also a smaller weight "
            "of short jumps, with tangents more of them."
        )
    return lines


def _on_gaps(gaps: Sequence[Gap]) -> list[str]:
    compared = [gap for gap in gaps if gap.sigma_t < max(gap.sigma_t for gap in gaps)]
    if not compared:
        return []
    widest = max(gaps, key=lambda gap: gap.gap)
    lines = [
        f"The scores differ most at sigma {widest.sigma_s:g} of jumps from {widest.sigma_t:g}, by {widest.gap:.3g}."
    ]
    least = min(compared, key=lambda gap: gap.sensitivity)
    if least.sensitivity < LOW_SENSITIVITY:
        lines.append(
            f"The auxiliary score hardly tells jumps from sigma {least.sigma_t:g} from the longest ones: at sigma "
            f"{least.sigma_s:g} its gap differs by {least.sensitivity:.0%} of its size."
        )
    return lines


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:g}" for sigma in sigmas)
