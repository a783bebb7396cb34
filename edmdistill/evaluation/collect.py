"""Statistics of a data set in several feature spaces, collected in one pass and kept in a file, as a reference.

The file is an .npz that numpy.load reads without pickles. For each feature space NAME it holds

    mu_NAME [d], sigma_NAME [d,d]   mean and unbiased covariance, float64
    features_NAME [kept,d]          of images drawn at random, the same in all spaces, float32; if any are kept

and `about`, references.About as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from edmdistill import __version__
from edmdistill.atomic import atomic_write
from edmdistill.data.datasets import Dataset
from edmdistill.draws import Draws
from edmdistill.errors import DatasetError
from edmdistill.evaluation.feature_set import Features
from edmdistill.evaluation.frechet import GaussianStatistics, RunningStatistics
from edmdistill.evaluation.images import dataset_images, open_images
from edmdistill.evaluation.pipeline import DIGEST, measure_images, pixels_sha256
from edmdistill.evaluation.references import About, ReferenceStatistics, SpaceStatistics, open_statistics
from edmdistill.evaluation.shards import ONE_PROCESS, Processes, Work, batches, measure_all
from edmdistill.features.base import FeatureSpace


def collect_statistics(
    data: Dataset,
    spaces: Mapping[str, FeatureSpace],
    *,
    keep: int = 0,
    device: torch.device | str = "cpu",
    work: Work | None = None,
    processes: Processes = ONE_PROCESS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> tuple[About, dict[str, SpaceStatistics]] | None:
    """Returns what is known of a data set, and its statistics in each feature space; the first process alone has them.

    Args:
        keep: for so many images, or all if there are fewer, the features are kept, for metrics such as precision.
        device: of the spaces.
        work: where features are kept meanwhile, so that a stopped command goes on; None: nowhere, for one process.
        processes: that share the work.
        on_progress: called with the number of images that have just been measured.
    Raises: DatasetError: there are fewer than two images, or they do not fit a space.
    """
    if len(data) < 2:
        raise DatasetError(f"{data.name} has {len(data)} image, and a covariance needs two: give more")
    images = dataset_images(data)
    weights = {name: space.sha256 for name, space in spaces.items()}
    identity = {"reference": data.content_sha256, "weights": weights}
    folder = None if work is None else work.folder(identity, processes, several=True)
    statistics = {name: RunningStatistics() for name in spaces}
    features = {name: Features() for name in spaces}
    kept = _drawn(len(data), keep)
    digests: list[Tensor] = []
    measure = partial(measure_images, images, spaces, device=device, digests=True)
    for rows, arrays in measure_all(
        len(data), images.block, measure, folder=folder, processes=processes, on_progress=on_progress
    ):
        digests.append(arrays[DIGEST])
        for name in spaces:
            statistics[name].update(arrays[f"{name}/features"])
            features[name].update(arrays[f"{name}/features"][kept[rows.start : rows.stop]])
    if processes.rank:
        return None
    about = About(
        n=len(data),
        weights=weights,
        source=Path(data.name).name,
        split=data.split,
        sha256=pixels_sha256(data.size, torch.cat(digests)),
        fingerprint=data.fingerprint,
        version=__version__,
    )
    return about, {
        name: SpaceStatistics(statistics[name].finish(), features[name].finish() if keep else None, weights[name])
        for name in spaces
    }


def real_statistics(
    reference: Dataset | ReferenceStatistics,
    space: FeatureSpace,
    batch: int,
    on_batch: Callable[[], object] = lambda: None,
) -> GaussianStatistics:
    """Returns mean and covariance of the features of real images.

    Args:
        batch: images at a time.
        on_batch: called before each.
    Raises: EdmDistillError: statistics of other features.  DatasetError: an image cannot be read.
    """
    if isinstance(reference, Dataset):
        images = dataset_images(reference)
    elif space.name in reference.spaces or not reference.has_images:
        stated: GaussianStatistics = reference.collected(space, RunningStatistics)
        return stated
    else:
        images = open_images(reference.path, 0)
    running = RunningStatistics()
    for rows in batches(range(images.count), batch):
        on_batch()
        running.update(space(images.read(rows)))
    return running.finish()


def _drawn(count: int, keep: int) -> Tensor:
    """Draws `keep` of `count` rows.  bool [count]"""
    drawn = torch.zeros(count, dtype=torch.bool)
    drawn[Draws(0, count).uniform().argsort()[:keep]] = True
    return drawn


def holds_statistics(path: Path, data: Dataset, spaces: Mapping[str, FeatureSpace], keep: int) -> bool:
    """Returns whether the file at `path` is what `collect_statistics` and `write_statistics` would make."""
    try:
        statistics = open_statistics(path)
    except DatasetError:
        return False
    if statistics.about is None or statistics.about.fingerprint != data.fingerprint:
        return False
    kept = {None if space.features is None else len(space.features) for space in statistics.spaces.values()}
    wanted = {name: space.sha256 for name, space in spaces.items()}
    return statistics.about.weights == wanted and kept == {min(keep, len(data)) or None}


def write_statistics(path: Path, about: About, spaces: Mapping[str, SpaceStatistics]) -> None:
    """Writes what `collect_statistics` returns.  Raises: CheckpointError: the disk refuses."""
    arrays = {"about": np.array(msgspec.json.encode(about).decode())}
    for name, space in spaces.items():
        arrays[f"mu_{name}"], arrays[f"sigma_{name}"] = (tensor.numpy() for tensor in space.gaussian[:2])
        if space.features is not None:
            arrays[f"features_{name}"] = space.features.values.numpy()
    with atomic_write(path) as new, new.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
