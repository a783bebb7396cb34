"""References that are statistics of images, not images: files of EDM, EDM2, ADM, and our own.

| layout | file | holds |
|---|---|---|
| edm | .npz | mu, sigma of Inception's features |
| edm2 | .pkl | num_images; fid and fd_dinov2, each with mu and sigma |
| adm | .npz | mu, sigma of Inception's features; mu_s, sigma_s, of its spatial ones; perhaps arr_0, images |
| edmdistill | .npz | see evaluation.collect |

No pickle is executed, and what a header claims is checked before memory is taken.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from edmdistill.atomic import require_no_pipe, sha256_file
from edmdistill.data.files import as_dataset_error, status_of
from edmdistill.data.npz import Npz
from edmdistill.errors import DatasetError, EdmDistillError, printable
from edmdistill.evaluation.base import Accumulator, Nothing
from edmdistill.evaluation.feature_set import Features, FeatureSet
from edmdistill.evaluation.frechet import GaussianStatistics, RunningStatistics, factor
from edmdistill.evaluation.image_arrays import IMAGES, open_npz
from edmdistill.features.base import FeatureSpace
from edmdistill.pickles import Unpickler, Unreadable
from edmdistill.stored_tensors import NUMPY, Array, mapped

MAX_DIM, MAX_FEATURES = 2**13, 2**31
"""The largest number of features that is read, and of features of all images: 540 MB of sigma, 8.6 GB of features."""
COVARIANCE_TOLERANCE = 1e-5
"""How far sigma may be from symmetric and positive semidefinite, relative to its largest entry: some are float32."""
WANTED = "give EDM's or ADM's .npz, EDM2's .pkl, what `edmdistill data stats` writes, or images in an .npz"


class About(Struct, frozen=True, kw_only=True):
    """The record of `data stats` beside the numbers, JSON in the array `about`."""

    n: int
    """The number of images."""
    weights: dict[str, str | None]
    """The sha256 of the weights of each feature space; its name says the input rule."""
    source: str
    """The file name of the set."""
    split: str
    """The part of it that was measured."""
    sha256: str
    """Digest of the images' pixels, as in Reference."""
    fingerprint: str
    """The set's fingerprint, see Dataset."""
    version: str
    """Version of edmdistill."""


@dataclass(frozen=True)
class SpaceStatistics:
    """The reference in one feature space.

    Attributes:
        gaussian: mean and covariance of all features.
        features: those of some images; None: none were kept.
        weights_sha256: of the space's weights; None: not recorded, or it has none.
    """

    gaussian: GaussianStatistics
    features: FeatureSet | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """A reference file.

    Attributes:
        path: the file.
        layout: edm, edm2, adm, images or edmdistill.
        sha256: of the images' pixels where the file says it, else of the file.
        n: the number of images; None: not recorded.
        spaces: by the names of feature spaces; empty: it holds images alone.
        about: see About; of our own layout alone.
        has_images: whether it has images themselves, as arr_0 or images: ADM's, and what `sample` writes.
    """

    path: Path
    layout: str
    sha256: str
    n: int | None
    spaces: Mapping[str, SpaceStatistics]
    about: About | None = None
    has_images: bool = False

    def collected(self, space: FeatureSpace, kind: type[Accumulator]) -> Any:
        """Returns what an accumulator of a metric would collect from the images' features.

        Raises: EdmDistillError: the file does not have it, or has it of other weights.
        """
        if kind is Nothing:
            return None
        statistics = self.spaces.get(space.name)
        if statistics is None:
            listed = ", ".join(self.spaces)
            self._refuse(f"has no statistics of the feature space {space.name}, only of {listed}", space)
        dim = len(statistics.gaussian.mean)
        if space.dim not in (None, dim):
            self._refuse(f"has statistics of {dim} features of {space.name}, but these weights have {space.dim}", space)
        if self.about is not None and statistics.weights_sha256 != space.sha256:
            theirs, ours = str(statistics.weights_sha256)[:8], str(space.sha256)[:8]
            self._refuse(f"was made with other weights of {space.name} ({theirs}) than these ({ours})", space)
        if kind is RunningStatistics:
            return statistics.gaussian
        if kind is Features and statistics.features is not None:
            return statistics.features
        self._refuse("has no features of single images, which this metric needs", space, " --keep-features 10000")

    def _refuse(self, why: str, space: FeatureSpace, options: str = "") -> NoReturn:
        raise EdmDistillError(
            f"{self.path} {why}: give the images themselves, or make it by "
            f"`edmdistill data stats SET OUT.npz --features {space.name}{options}`"
        )


def is_statistics(source: str | Path) -> bool:
    """Returns whether a source is a reference file by its suffix: a .pkl or an .npz."""
    path = Path(source)
    return path.suffix.lower() in (".npz", ".pkl") and not path.is_dir()


def open_statistics(path: str | Path) -> ReferenceStatistics:
    """Reads a reference file of any layout.

    Raises: DatasetError: it cannot be read, is damaged or hostile, or its numbers are no mean and covariance.
    """
    path = Path(path)
    require_no_pipe(path, DatasetError)
    if stat.S_ISDIR(status_of(path, WANTED).st_mode):
        raise DatasetError(f"{path} is a folder; {WANTED}")
    with as_dataset_error(lambda why: f"{path} cannot be read ({why}); {WANTED}"):
        with path.open("rb") as file:
            head = file.read(2)
        if head == b"PK":
            return _read_npz(path)
        if head[:1] == b"\x80":
            return _read_pickle(path)
    raise DatasetError(f"{path} is {'neither an .npz nor a pickle' if head else 'an empty file'}; {WANTED}")


def _read_npz(path: Path) -> ReferenceStatistics:
    arrays = Npz(path)
    if "about" in arrays.names:
        about = _read_about(arrays)
        spaces = {name: _own_space(arrays, name, about) for name in about.weights}
        return ReferenceStatistics(path, "edmdistill", about.sha256, about.n, spaces, about)
    has_images = bool(arrays.names & set(IMAGES))
    if has_images and not arrays.names & {"mu", "sigma"}:
        count = open_npz(path)[0].header.shape[0]
        return ReferenceStatistics(path, "images", sha256_file(path), count, {}, has_images=True)
    if not {"mu", "sigma"} <= arrays.names:
        members = ", ".join(map(printable, sorted(arrays.names)[:5])) or "nothing"
        raise DatasetError(f"{path} holds {members}, but mu and sigma were expected; {WANTED}")
    spaces = {"inception": SpaceStatistics(_gaussian(str(path), *_moments(arrays)))}
    layout = "adm" if has_images or "mu_s" in arrays.names else "edm"
    return ReferenceStatistics(path, layout, sha256_file(path), None, spaces, has_images=has_images)


def _moments(arrays: Npz, suffix: str = "") -> tuple[NDArray[Any], NDArray[Any]]:
    return arrays.read(f"mu{suffix}", MAX_DIM), arrays.read(f"sigma{suffix}", MAX_DIM**2)


def _read_about(arrays: Npz) -> About:
    with as_dataset_error(lambda why: f"{arrays.path}: about cannot be read ({why}); make the statistics again"):
        return msgspec.json.decode(str(arrays.read("about", 1).item()), type=About)


def _own_space(arrays: Npz, name: str, about: About) -> SpaceStatistics:
    where, key = f"{arrays.path}: {name}", f"features_{name}"
    gaussian = _gaussian(where, *_moments(arrays, f"_{name}"), about.n)
    features = None
    if key in arrays.names:
        values = arrays.read(key, MAX_FEATURES)
        if values.shape[1:] != gaussian.mean.shape or not np.isfinite(values).all():
            raise DatasetError(
                f"{where}: features {list(values.shape)} are not of {len(gaussian.mean)} finite numbers; make the "
                "statistics again"
            )
        features = FeatureSet(torch.from_numpy(values.astype(np.float32)))
    return SpaceStatistics(gaussian, features, about.weights[name])


def _read_pickle(path: Path) -> ReferenceStatistics:
    data = mapped(path)
    try:
        entries = Unpickler(data, NUMPY).run()
    except Unreadable as error:
        if b"torch_utils.persistence" in bytes(data[:4096]):
            raise DatasetError(f"{path} is a network, not statistics of images; {WANTED}") from error
        raise DatasetError(f"{path} {error}") from error
    entries = entries if isinstance(entries, dict) else {}
    count = entries.get("num_images")
    n, spaces = count if isinstance(count, int) else None, {}
    for key, name in (("fid", "inception"), ("fd_dinov2", "dinov2")):
        match entries.get(key):
            case {"mu": Array() as mu, "sigma": Array() as sigma}:
                spaces[name] = SpaceStatistics(_gaussian(f"{path}: {key}", mu.numbers, sigma.numbers, n))
    if not spaces:
        raise DatasetError(f"{path} has neither fid nor fd_dinov2 with mu and sigma; {WANTED}")
    return ReferenceStatistics(path, "edm2", sha256_file(path), n, spaces)


def _gaussian(where: str, mu: NDArray[Any], sigma: NDArray[Any], n: int | None = None) -> GaussianStatistics:
    """Returns the statistics of a reference.  Raises: DatasetError: they are no mean and covariance."""
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not 0 < len(mu) <= MAX_DIM:
        raise DatasetError(
            f"{where}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are not [d] and [d,d], d at most {MAX_DIM}; "
            f"{WANTED}"
        )
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DatasetError(f"{where}: mu and sigma are {mu.dtype} and {sigma.dtype}, not floating-point; {WANTED}")
    mean, covariance = mu.astype(np.float64), sigma.astype(np.float64)
    for name, values in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(values).all():
            raise DatasetError(f"{where}: {name} holds NaN or infinity; make the statistics again")
    bound = COVARIANCE_TOLERANCE * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > bound:
        raise DatasetError(f"{where}: sigma is not symmetric, so it is no covariance; make the statistics again")
    covariance = (covariance + covariance.T) / 2
    root = factor(covariance)
    if np.abs(covariance - root @ root.T).max() > bound:
        raise DatasetError(f"{where}: sigma has a negative variance, so it is no covariance; make the statistics again")
    return GaussianStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), n)
