"""Averages of weights by a power function of time, and others that are put together from them after training.

The average after `images` of length `sigma_rel` weighs the weights of time t in proportion to t^gamma; sigma_rel is the
standard deviation of that profile, as a share of its length. Two averages at a few moments are enough for any other.
Source: Karras et al. 2024 (EDM2), section 3 and appendix C.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from edmdistill.checkpoints.convert import build_official
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.store import (
    CheckpointConfig,
    Provenance,
    build_flow,
    facts,
    fill,
    load_tensors,
    read_config,
    save_checkpoint,
    save_tensors,
)
from edmdistill.errors import CheckpointError
from edmdistill.networks.preconditioning import FlowNetwork
from edmdistill.networks.two_time import add_second_time

LONGEST = 12**-0.5
"""sigma_rel of a plain mean over all time, gamma = 0."""


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
    """The inverse of gamma_to_sigma_rel: the largest root of a cubic.  sigma_rel in (0, LONGEST]

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


def coefficients(stored: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """The shares of stored averages in the one that comes nearest to the wanted one; their sum is 1.  [len(stored)]

    Source: EDM2, algorithm 3.
    """
    shares = np.linalg.solve(inner_products(stored, stored), inner_products(stored, [wanted]))[:, 0]
    normalised: NDArray[np.float64] = shares / shares.sum()
    return normalised


Load = Callable[[], Mapping[str, Tensor]]


def reconstruct(
    stored: Mapping[Profile, Load], wanted: Profile, on_progress: Callable[[int], object] = lambda count: None
) -> dict[str, Tensor]:
    """The wanted average, from stored ones that are loaded one at a time.

    Tensors are summed in float32 and given back in the dtype in which they are stored; what is the same in all, as
    buffers are, stays exactly so.

    Args:
        on_progress: called with the number of averages that have just been read.
    """
    profiles = sorted(stored)
    sums: dict[str, Tensor] = {}
    first: Mapping[str, Tensor] = {}
    constant: set[str] = set()
    for profile, share in zip(profiles, coefficients(profiles, wanted), strict=True):
        tensors = stored[profile]()
        if not first:
            first, constant = tensors, set(tensors)
        constant = {name for name in constant if torch.equal(tensors[name], first[name])}
        for name, tensor in tensors.items():
            part = tensor.float() * float(share)
            sums[name] = sums[name] + part if name in sums else part
        on_progress(1)
    return {name: tensor if name in constant else sums[name].to(tensor.dtype) for name, tensor in first.items()}


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
    save_tensors(snapshot_path(folder, profile), half)


def find_snapshots(source: Path) -> dict[Profile, Path]:
    """The averages that a run or the official trainer has left, RUN/ema/IMAGES-SIGMA.safetensors or ...-KIMG-SIGMA.pkl.

    Raises: CheckpointError: fewer than two, which cannot be put together.
    """
    found = {}
    for path in sorted([*source.glob("ema/*.safetensors"), *source.glob("*.pkl"), *source.glob("*.pkl.gz")]):
        name = re.fullmatch(r"(?:.*-)?(\d+)-(0\.\d+)\.(safetensors|pkl|pkl\.gz)", path.name)
        if name is not None:
            images = int(name[1]) if name[3] == "safetensors" else kimg_to_images(int(name[1]))
            found[Profile(images, float(name[2]))] = path
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
        images: after how many; default: the latest that there is.
        on_start: is told how many averages will be read, and gives what hears of them.
    Raises: CheckpointError: too few averages, or of different networks; or a length or a moment that they do not reach.
    """
    files = find_snapshots(source)
    last = max(profile.images for profile in files)
    wanted = Profile(last if images is None else images, sigma_rel)
    if not 0 < sigma_rel < LONGEST:
        raise CheckpointError(f"sigma_rel is {sigma_rel:g}, but lies between 0 and {LONGEST:.4f}")
    if not 0 < wanted.images <= last:
        raise CheckpointError(f"the averages in {source} end after {last:,} images: {wanted.images:,} cannot be had")
    # Later ones know nothing of what is wanted.
    files = {profile: path for profile, path in files.items() if profile.images <= wanted.images}
    if len(files) < 2:
        raise CheckpointError(f"{source} holds {len(files)} averages up to {wanted.images:,} images: ask for more")

    official = next(iter(files.values())).suffix != ".safetensors"
    load = _load_official if official else _load_own
    tensors = reconstruct({profile: load(path) for profile, path in files.items()}, wanted, on_start(len(files)))
    made = {"sigma_rel": sigma_rel, "images": wanted.images, "from": [path.name for path in files.values()]}
    build = _build_official if official else _build_own
    flow, config = build(source, next(iter(files.values())), tensors)
    config = replace(config, ema=made, images_seen=wanted.images if config.stage == "generator" else None)
    save_checkpoint(out, flow, config, overwrite=overwrite)
    return config


def _load_own(path: Path) -> Load:
    return lambda: load_tensors(path)[0]


def _load_official(path: Path) -> Load:
    return lambda: read_official(path).tensors


def _build_own(source: Path, first: Path, tensors: Mapping[str, Tensor]) -> tuple[FlowNetwork, CheckpointConfig]:
    config = read_config(source / "generator")
    flow = build_flow(config.network, config.preconditioning, str(source))
    fill(flow.network, {name: tensor.float() for name, tensor in tensors.items()}, str(source))
    return flow, config


def _build_official(source: Path, first: Path, tensors: Mapping[str, Tensor]) -> tuple[FlowNetwork, CheckpointConfig]:
    flow, config = build_official(read_official(first), tensors=tensors)
    flow = add_second_time(flow)
    provenance = Provenance(source=f"snapshots in {source.name}", licence=config.provenance.licence)
    return flow, replace(config, provenance=provenance, **facts(flow))
