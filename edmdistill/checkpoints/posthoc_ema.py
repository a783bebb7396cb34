"""Averages of weights by a power function of time, and others that are put together from them after training.

The average after `images` of length `sigma_rel` weighs the weights of time t in proportion to t^gamma; sigma_rel is the
standard deviation of that profile, as a share of its length. Two averages at a few moments are enough for any other.
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
    build_flow,
    fill,
    load_tensors,
    refuse_occupied,
    save_checkpoint,
    save_tensors,
)
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time

MAX_SIGMA_REL = 12**-0.5
"""sigma_rel of a plain mean over all time, gamma = 0."""
MAX_MISFIT = 0.5
"""The largest misfit of an average that is worth its name."""


class Profile(NamedTuple):
    """A power-function average: of which length, and after how many images."""

    images: int
    sigma_rel: float

    @property
    def gamma(self) -> float:
        return sigma_rel_to_gamma(self.sigma_rel)


def gamma_to_sigma_rel(gamma: float) -> float:
    """(gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2), the standard deviation of t^gamma on [0, 1].

    Source: EDM2, eq. 123.
    """
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The inverse of gamma_to_sigma_rel: the largest root of a cubic.  sigma_rel in (0, MAX_SIGMA_REL]

    Source: EDM2, eq. 126 and algorithm 2.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_function_beta(images: int, batch: int, gamma: float) -> float:
    """The share of the old average in a step of `batch` images, before which `images` were seen.

    Source: EDM2, eq. 127.
    """
    return float((1 - batch / (images + batch)) ** (gamma + 1))


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """The integrals of the products of the profiles' densities over time.  [len(a),len(b)]  Source: EDM2, eq. 151."""
    t_a, t_b = (np.array([profile.images for profile in ps], np.float64) for ps in (a, b))
    g_a, g_b = (np.array([profile.gamma for profile in ps], np.float64) for ps in (a, b))
    t_a, g_a = t_a[:, None], g_a[:, None]
    exponent = np.where(t_a < t_b, g_b, -g_a)
    product: NDArray[np.float64] = (
        (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    )
    return product


def coefficients(stored: Sequence[Profile], wanted: Sequence[Profile]) -> NDArray[np.float64]:
    """The shares of stored averages in those that come nearest to the wanted ones.  [len(stored),len(wanted)]

    Those of each sum to 1.
    Source: EDM2, algorithm 3.
    """
    shares = np.linalg.solve(inner_products(stored, stored), inner_products(stored, wanted))
    normalised: NDArray[np.float64] = shares / shares.sum(axis=0)
    return normalised


def misfits(stored: Sequence[Profile], wanted: Sequence[Profile]) -> NDArray[np.float64]:
    """How far the profiles that `coefficients` makes are from the wanted ones, as a share of these.  [len(wanted)]

    |made - wanted| / |wanted|, the norm being that of which `inner_products` are the products: 0 is the wanted average
    itself, 1 is as far from it as nothing at all.
    """
    shares = coefficients(stored, wanted)
    squares = np.array([inner_products([profile], [profile]).item() for profile in wanted])
    mixed = (shares * inner_products(stored, wanted)).sum(axis=0)
    made = (shares * (inner_products(stored, stored) @ shares)).sum(axis=0)
    errors: NDArray[np.float64] = np.sqrt(np.maximum(squares - 2 * mixed + made, 0) / squares)
    return errors


Load = Callable[[], Mapping[str, Tensor]]


def reconstruct(
    stored: Mapping[Profile, Load], wanted: Profile, on_progress: Callable[[int], object] = lambda count: None
) -> dict[str, Tensor]:
    """The wanted average, from stored ones that are loaded one at a time.

    Tensors are summed in float32, by images and length; what is the same in all, as buffers are, stays exactly so.

    Args:
        on_progress: called with the number of averages that have just been read.
    Raises: CheckpointError: they are of different networks.
    """
    profiles = sorted(stored)
    sums: dict[str, Tensor] = {}
    first: Mapping[str, Tensor] = {}
    constant: set[str] = set()
    for profile, share in zip(profiles, coefficients(profiles, [wanted])[:, 0], strict=True):
        tensors = stored[profile]()
        if not first:
            first, constant = tensors, set(tensors)
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in first.items()}:
            raise CheckpointError(
                f"the averages are not of one network: that of sigma_rel {profile.sigma_rel:g} after "
                f"{profile.images:,} images has other tensors than the one before it: give those of one training"
            )
        constant = {name for name in constant if torch.equal(tensors[name], first[name])}
        for name, tensor in tensors.items():
            part = tensor.float() * float(share)
            sums[name] = sums[name] + part if name in sums else part
        on_progress(1)
    return {name: tensor.float() if name in constant else sums[name] for name, tensor in first.items()}


# Files.


def snapshot_path(folder: Path, profile: Profile) -> Path:
    """Where a run keeps an average: folder/000000262144-0.050.safetensors."""
    return folder / f"{profile.images:012d}-{profile.sigma_rel:.3f}.safetensors"


def save_snapshot(folder: Path, profile: Profile, weights: Mapping[str, Tensor], constants: set[str]) -> None:
    """Writes an average, in float16 as the official code does.

    Args:
        constants: the names of what is no average, the buffers; they are written as they are.
    Raises: CheckpointError: the disk refuses.
    """
    half = {name: tensor if name in constants else tensor.half() for name, tensor in weights.items()}
    # One entry: of several, safetensors writes the order as it comes, and the same average would not be the same file.
    save_tensors(snapshot_path(folder, profile), half, {"average": json.dumps(profile._asdict())})


def find_snapshots(source: Path) -> dict[Profile, Path]:
    """The averages that a run or the official trainer has left, RUN/ema/IMAGES-SIGMA.safetensors or ...-KIMG-SIGMA.pkl.

    The official trainer's first ones, before any image, are left out: they are no averages.
    Raises: CheckpointError: fewer than two, which cannot be put together, or of several trainings.
    """
    found, trainings = {}, set()
    for path in sorted(source.glob("ema/*.safetensors")) or sorted([*source.glob("*.pkl"), *source.glob("*.pkl.gz")]):
        name = re.fullmatch(r"(.*?)-?(\d+)-(0\.\d+)\.(safetensors|pkl|pkl\.gz)", path.name)
        if name is None or int(name[2]) == 0:
            continue
        images = int(name[2]) if name[4] == "safetensors" else kimg_to_images(int(name[2]))
        found[Profile(images, float(name[3]))] = path
        trainings.add(name[1])
    if len(trainings) > 1:
        raise CheckpointError(
            f"{source} holds averages of several trainings, {', '.join(sorted(trainings))}: give a folder for one"
        )
    if len(found) < 2:
        raise CheckpointError(
            f"{source} holds {len(found)} averages, and it takes two or more: give a run of a recipe with "
            "ema.snapshot_every, or a folder of the official trainer's network-snapshot-KIMG-SIGMA.pkl"
        )
    return found


def kimg_to_images(kimg: int) -> int:
    """The images behind the thousands in an official file's name: the next multiple of 1024."""
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
    """Puts an average together and writes it as a checkpoint.

    Args:
        source: a run directory, or a folder of official snapshots.
        images: after how many, of those after which averages were kept; default: the latest.
        on_start: is told how many averages will be read, and gives what hears of them.
    Raises: CheckpointError: too few averages, or of different networks; or a length or a moment that they do not reach.
    """
    files = find_snapshots(source)
    wanted = Profile(max(profile.images for profile in files) if images is None else images, sigma_rel)
    files = _up_to(wanted.images, files, source)
    misfit = _require_reach(list(files), wanted, source)
    refuse_occupied(out, overwrite)
    together = partial(reconstruct, wanted=wanted, on_progress=on_start(len(files)))
    official = next(iter(files.values())).suffix != ".safetensors"
    flow, config = (_make_teacher if official else _make_own)(source, files, together)
    names = [files[profile].name for profile in sorted(files)]
    made = {"sigma_rel": sigma_rel, "images": wanted.images, "misfit": misfit, "from": names}
    config = replace(config, ema=made, results=())
    if config.images_seen is not None:
        config = replace(config, images_seen=wanted.images)
    save_checkpoint(out, flow, config, overwrite=overwrite)
    return config


def _up_to(images: int, files: Mapping[Profile, Path], source: Path) -> dict[Profile, Path]:
    """Those until then.  Later ones know nothing of what is wanted, and of a moment between two, neither do."""
    moments = sorted({profile.images for profile in files})
    if images not in moments:
        near = min(moments, key=lambda moment: abs(moment - images))
        raise CheckpointError(
            f"{source} holds no averages after {images:,} images: the nearest are after {near:,}, "
            f"the last after {moments[-1]:,}"
        )
    until = {profile: path for profile, path in files.items() if profile.images <= images}
    if len(until) < 2:
        raise CheckpointError(f"{source} holds {len(until)} averages up to {images:,} images: ask for more")
    return until


def _require_reach(stored: Sequence[Profile], wanted: Profile, source: Path) -> float:
    """The misfit of a length that can be had."""
    if not 0 < wanted.sigma_rel < MAX_SIGMA_REL:
        raise CheckpointError(f"sigma_rel is {wanted.sigma_rel:g}, but lies between 0 and {MAX_SIGMA_REL:.4f}")
    misfit = float(misfits(stored, [wanted])[0])
    if misfit > MAX_MISFIT:
        lengths = np.arange(1, int(1000 * MAX_SIGMA_REL) + 1) / 1000
        within = lengths[misfits(stored, [Profile(wanted.images, float(length)) for length in lengths]) <= MAX_MISFIT]
        nearest = within[np.abs(within - wanted.sigma_rel).argmin()]
        raise CheckpointError(
            f"the {len(stored)} averages in {source} do not reach sigma_rel {wanted.sigma_rel:g}, which they miss by "
            f"{misfit:.0%}: the nearest that they do is {nearest:.3f}, and more averages reach further"
        )
    return misfit


Together = Callable[[Mapping[Profile, Load]], Mapping[str, Tensor]]


def _make_own(source: Path, files: Mapping[Profile, Path], together: Together) -> tuple[FlowNetwork, CheckpointConfig]:
    """The network of a run, as in RUN/generator."""
    config = read_config(source / "generator")
    flow = build_flow(config.network, config.preconditioning, str(source))

    def load(path: Path) -> Mapping[str, Tensor]:
        return load_tensors(path)[0]

    fill(flow.network, together({profile: partial(load, path) for profile, path in files.items()}), str(source / "ema"))
    return flow, config


def _make_teacher(
    source: Path, files: Mapping[Profile, Path], together: Together
) -> tuple[FlowNetwork, CheckpointConfig]:
    """The network of official snapshots, as `convert` makes it of the official reconstruction's file."""
    one = read_official(next(iter(files.values())))

    def load(path: Path) -> Mapping[str, Tensor]:
        return read_official(path).tensors

    sums = together({profile: partial(load, path) for profile, path in files.items()})
    stored = {name: tensor.to(one.tensors[name].dtype) for name, tensor in sums.items()}
    flow, config = build_official(one, tensors=stored)
    flow = add_second_time(flow)
    provenance = replace(config.provenance, source=f"snapshots in {source_name(source)}", sha256=None)
    return flow, replace(config, provenance=provenance, **describe(flow))
