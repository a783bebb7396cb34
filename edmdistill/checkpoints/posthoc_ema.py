"""Power-function averages of weights, and the reconstruction of others from them after training.

The average of length `sigma_rel` after `images` weights what was learned at time t by t^gamma; sigma_rel is the
standard deviation of that profile, relative to its length. Two averages, saved several times, suffice for any other.
Source: Karras et al. 2024 (EDM2), section 3 and appendix C.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, describe, read_config
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.source import source_name
from edmdistill.checkpoints.store import (
    build_meta,
    fill,
    load_tensors,
    refuse_occupied,
    save_checkpoint,
    save_tensors,
)
from edmdistill.errors import CheckpointError, counted
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time

MAX_SIGMA_REL = 12**-0.5
"""sigma_rel of a plain mean over all time, gamma = 0."""
MAX_MISFIT = 0.5
"""Largest misfit of a reconstruction that is accepted."""


class Profile(NamedTuple):
    """A power-function average: its length, and the number of images after which it was taken."""

    images: int
    sigma_rel: float

    @property
    def gamma(self) -> float:
        return sigma_rel_to_gamma(self.sigma_rel)


def gamma_to_sigma_rel(gamma: float) -> float:
    """Returns the standard deviation of t^gamma on [0, 1]: (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2).

    Source: EDM2, eq. 123.
    """
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Returns the inverse of gamma_to_sigma_rel: the largest root of a cubic.  sigma_rel in (0, MAX_SIGMA_REL]

    Source: EDM2, eq. 126 and algorithm 2.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_function_beta(images: int, batch: int, gamma: float) -> float:
    """Returns the weight of the old average in a step of `batch` images after `images` were seen.

    Source: EDM2, eq. 127.
    """
    return float((1 - batch / (images + batch)) ** (gamma + 1))


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """Returns the integrals over time of the products of the profiles' densities.  [len(a),len(b)]

    Source: EDM2, eq. 151.
    """
    t_a, t_b = (np.array([profile.images for profile in ps], np.float64) for ps in (a, b))
    g_a, g_b = (np.array([profile.gamma for profile in ps], np.float64) for ps in (a, b))
    t_a, g_a = t_a[:, None], g_a[:, None]
    exponent = np.where(t_a < t_b, g_b, -g_a)
    product: NDArray[np.float64] = (
        (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    )
    return product


def coefficients(stored: Sequence[Profile], targets: Sequence[Profile]) -> NDArray[np.float64]:
    """Returns the weights of stored averages in the best approximations of targets.  [len(stored),len(targets)]

    The weights of each target sum to 1.
    Source: EDM2, algorithm 3.
    """
    weights = np.linalg.solve(inner_products(stored, stored), inner_products(stored, targets))
    normalized: NDArray[np.float64] = weights / weights.sum(axis=0)
    return normalized


def misfits(stored: Sequence[Profile], targets: Sequence[Profile]) -> NDArray[np.float64]:
    """Returns the relative errors of the approximations that `coefficients` gives.  [len(targets)]

    |approximation - target| / |target| in the norm of `inner_products`: 0 is the target itself; 1 is as far as zero.
    """
    weights = coefficients(stored, targets)
    squares = np.array([inner_products([profile], [profile]).item() for profile in targets])
    mixed = (weights * inner_products(stored, targets)).sum(axis=0)
    approximations = (weights * (inner_products(stored, stored) @ weights)).sum(axis=0)
    errors: NDArray[np.float64] = np.sqrt(np.maximum(squares - 2 * mixed + approximations, 0) / squares)
    return errors


Load = Callable[[], Mapping[str, Tensor]]


def reconstruct(
    stored: Mapping[Profile, Load], target: Profile, on_progress: Callable[[int], object] = lambda count: None
) -> dict[str, Tensor]:
    """Returns an average, reconstructed from stored ones that are loaded one at a time.

    Tensors are summed in float32, by images and length; what is equal in all, as buffers are, is kept exactly.

    Args:
        on_progress: called with the number of averages that have just been read.
    Raises: CheckpointError: they belong to different networks.
    """
    profiles = sorted(stored)
    sums: dict[str, Tensor] = {}
    first: Mapping[str, Tensor] = {}
    constant: set[str] = set()
    for profile, weight in zip(profiles, coefficients(profiles, [target])[:, 0], strict=True):
        tensors = stored[profile]()
        if not first:
            first, constant = tensors, set(tensors)
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in first.items()}:
            raise CheckpointError(
                f"the averages belong to different networks: that of sigma_rel {profile.sigma_rel:g} after "
                f"{profile.images:,} images has other tensors than the one before it: give those of one training"
            )
        constant = {name for name in constant if torch.equal(tensors[name], first[name])}
        for name, tensor in tensors.items():
            weighted = tensor.float() * float(weight)
            sums[name] = sums[name] + weighted if name in sums else weighted
        on_progress(1)
    return {name: tensor.float() if name in constant else sums[name] for name, tensor in first.items()}


# Files.


def snapshot_path(folder: Path, profile: Profile) -> Path:
    """Returns the file of a run's average: folder/000000262144-0.050.safetensors."""
    return folder / f"{profile.images:012d}-{profile.sigma_rel:.3f}.safetensors"


def save_snapshot(folder: Path, profile: Profile, weights: Mapping[str, Tensor], constants: set[str]) -> None:
    """Writes an average, in float16 as the official code does.

    Args:
        constants: names of tensors that are not averaged, the buffers; they are written unchanged.
    Raises: CheckpointError: the disk refuses.
    """
    half = {name: tensor if name in constants else tensor.half() for name, tensor in weights.items()}
    save_tensors(snapshot_path(folder, profile), half, {"average": json.dumps(profile._asdict())})


def find_snapshots(source: Path) -> dict[Profile, Path]:
    """Returns the averages of a run or the official trainer, RUN/ema/IMAGES-SIGMA.safetensors or ...-KIMG-SIGMA.pkl.

    Files whose names are those of no average are left out, as the official trainer's first ones, before any image.
    Raises: CheckpointError: there are fewer than two, or those of several trainings.
    """
    snapshots, trainings = {}, set()
    for path in sorted(source.glob("ema/*.safetensors")) or sorted([*source.glob("*.pkl"), *source.glob("*.pkl.gz")]):
        name = re.fullmatch(r"(.*?)-?(\d+)-(0\.\d+)\.(safetensors|pkl|pkl\.gz)", path.name)
        if name is None or int(name[2]) == 0 or not 0 < float(name[3]) < MAX_SIGMA_REL:
            continue
        images = int(name[2]) if name[4] == "safetensors" else kimg_to_images(int(name[2]))
        snapshots[Profile(images, float(name[3]))] = path
        trainings.add(name[1])
    if len(trainings) > 1:
        raise CheckpointError(
            f"{source} contains averages of several trainings, {', '.join(sorted(trainings))}: use one folder for each"
        )
    if len(snapshots) < 2:
        raise CheckpointError(
            f"{source} holds {counted(len(snapshots), 'average')}, but two or more are needed: give a run of a recipe "
            "with ema.snapshot_every, or a folder of the official trainer's network-snapshot-KIMG-SIGMA.pkl"
        )
    return snapshots


def kimg_to_images(kimg: int) -> int:
    """Returns the number of images that an official file name gives in thousands: the next multiple of 1024."""
    return -(-kimg * 1000 // 1024) * 1024


def reconstruct_checkpoint(
    source: Path,
    out: Path,
    sigma_rel: float,
    images: int | None = None,
    *,
    overwrite: bool = False,
    on_start: Callable[[int], Callable[[int], object]] = lambda count: lambda done: None,
) -> CheckpointConfig:
    """Reconstructs an average and writes it as a checkpoint.

    Args:
        source: a run directory, or a folder of official snapshots.
        images: after how many, a number after which averages were saved; default: the latest.
        on_start: called with the number of averages that will be read; returns `on_progress` for `reconstruct`.
    Raises: CheckpointError: there are too few averages, of different networks, or far from this length or time.
    """
    refuse_occupied(out, overwrite)
    files = find_snapshots(source)
    target = Profile(max(profile.images for profile in files) if images is None else images, sigma_rel)
    files = _up_to(target.images, files, source)
    misfit = _require_reach(list(files), target, source)
    average = partial(reconstruct, target=target, on_progress=on_start(len(files)))
    official = next(iter(files.values())).suffix != ".safetensors"
    flow, config = (_official_network if official else _run_network)(source, files, average)
    names = [files[profile].name for profile in sorted(files)]
    ema = {"sigma_rel": sigma_rel, "images": target.images, "misfit": misfit, "from": names}
    config = replace(config, ema=ema, results=())
    if config.images_seen is not None:
        config = replace(config, images_seen=target.images)
    save_checkpoint(out, flow, config, overwrite=overwrite)
    return config


def _up_to(images: int, files: Mapping[Profile, Path], source: Path) -> dict[Profile, Path]:
    """Returns the averages up to a time at which some were saved.  Later ones do not help."""
    times = sorted({profile.images for profile in files})
    if images not in times:
        near = min(times, key=lambda time: abs(time - images))
        raise CheckpointError(
            f"{source} holds no averages after {images:,} images: the nearest are after {near:,}, "
            f"the last after {times[-1]:,}"
        )
    until = {profile: path for profile, path in files.items() if profile.images <= images}
    if len(until) < 2:
        count = counted(len(until), "average")
        raise CheckpointError(f"{source} holds {count} up to {images:,} images, and two are needed: raise --images")
    return until


def _require_reach(stored: Sequence[Profile], target: Profile, source: Path) -> float:
    """Returns the misfit of an average, which must be at most MAX_MISFIT."""
    if not 0 < target.sigma_rel < MAX_SIGMA_REL:
        raise CheckpointError(f"sigma_rel is {target.sigma_rel:g}, but lies between 0 and {MAX_SIGMA_REL:.4f}")
    misfit = float(misfits(stored, [target])[0])
    if misfit > MAX_MISFIT:
        lengths = np.arange(1, int(1000 * MAX_SIGMA_REL) + 1) / 1000
        within = lengths[misfits(stored, [Profile(target.images, float(length)) for length in lengths]) <= MAX_MISFIT]
        nearest = within[np.abs(within - target.sigma_rel).argmin()]
        raise CheckpointError(
            f"the {len(stored)} averages in {source} do not reach sigma_rel {target.sigma_rel:g}, which they miss by "
            f"{misfit:.0%}: ask for {nearest:.3f}, the nearest that they reach, or save more averages"
        )
    return misfit


Average = Callable[[Mapping[Profile, Load]], Mapping[str, Tensor]]


def _run_network(source: Path, files: Mapping[Profile, Path], average: Average) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network of a run, as in RUN/generator."""
    config = read_config(source / "generator")
    flow = build_meta(config, source / "generator")

    def load(path: Path) -> Mapping[str, Tensor]:
        return load_tensors(path)[0]

    fill(flow.network, average({profile: partial(load, path) for profile, path in files.items()}), str(source / "ema"))
    return flow, config


def _official_network(
    source: Path, files: Mapping[Profile, Path], average: Average
) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network of official snapshots, as `convert` makes it from the official reconstruction's file."""
    first = read_official(next(iter(files.values())))

    def load(path: Path) -> Mapping[str, Tensor]:
        return read_official(path).tensors

    sums = average({profile: partial(load, path) for profile, path in files.items()})
    stored = {name: tensor.to(getattr(torch, first.stored[name].dtype)) for name, tensor in sums.items()}
    flow, config = build_official(first, tensors=stored)
    flow = add_second_time(flow)
    provenance = replace(config.provenance, source=f"snapshots in {source_name(source)}", sha256=None)
    return flow, replace(config, provenance=provenance, **describe(flow))
