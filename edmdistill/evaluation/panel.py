"""The metrics of an evaluation, measured together: every image is drawn and put through each feature space once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.data.datasets import Dataset
from edmdistill.errors import NotFiniteError
from edmdistill.evaluation.base import Accumulator, Measured, Nothing
from edmdistill.evaluation.feature_set import Features, FeatureSet
from edmdistill.evaluation.images import Images, dataset_images, open_images
from edmdistill.evaluation.metrics import FoundMetric
from edmdistill.evaluation.pipeline import DIGEST, measure_images, pixels_sha256
from edmdistill.evaluation.protocol import Reference, describe_reference
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.evaluation.shards import ONE_PROCESS, Processes, Work, measure_all
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import load_features
from edmdistill.progress import progress_bar

Key = tuple[str, type[Accumulator]]
"""A feature space, and what is collected in it."""
Keys = Set[Key]


class Collected(NamedTuple):
    """The reference as metrics compare with it, by feature space and kind of accumulator, and its record."""

    by_space: Mapping[Key, Any]
    reference: Reference


@dataclass(frozen=True)
class Panel:
    """The metrics of an evaluation.

    Attributes:
        metrics: what is measured.
        weights: files of feature spaces, by name; others have their official weights.
        device: of the feature spaces.
        work: where features are kept, or None.
        processes: that share the work.
    """

    metrics: tuple[FoundMetric, ...]
    weights: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    work: Work | None = None
    processes: Processes = ONE_PROCESS

    @property
    def spaces(self) -> dict[str, FeatureSpace]:
        """The feature spaces by name."""
        files = dict(self.weights)
        names = dict.fromkeys(metric.features for metric in self.metrics)
        return {name: _load_space(name, files.get(name), self.device) for name in names}

    @property
    def keys(self) -> Keys:
        """What the metrics compare with."""
        return {(one.features, one.metric.reference) for one in self.metrics}

    def values(
        self,
        images: Images,
        collected: Collected,
        folder: Path | None,
        on_progress: Callable[[int], object],
    ) -> dict[str, float]:
        """Returns the metrics of images by name, on all processes.

        Args:
            folder: where their features are kept, or None.
        Raises: NotFiniteError: a sample, or a metric, is NaN or infinite.
        """
        logits = {metric.features for metric in self.metrics if "logits" in metric.metric.needs}
        measure = partial(measure_images, images, self.spaces, device=self.device, logits=logits)
        metrics = [
            (one, one.metric(collected.by_space[one.features, one.metric.reference]))
            for one in self.metrics
            if self.processes.rank == 0
        ]
        for rows, arrays in measure_all(
            images.count, images.block, measure, folder=folder, processes=self.processes, on_progress=on_progress
        ):
            labels = None if images.classes is None else images.classes[rows.start : rows.stop]
            for one, metric in metrics:
                features, scores = (arrays.get(f"{one.features}/{kind}") for kind in ("features", "logits"))
                assert features is not None
                metric.update(Measured(features.to(self.device), scores, labels))
        finished = [metric.finish() for _, metric in metrics] or [0.0] * len(self.metrics)
        values = self.processes.all_reduce(torch.tensor(finished, dtype=torch.float64)).tolist()
        return require_finite_metrics({one.name: value for one, value in zip(self.metrics, values, strict=True)})


@lru_cache(maxsize=4)
def collect_reference(reference: Dataset | ReferenceStatistics, panel: Panel) -> Collected:
    """Returns what the metrics of a panel compare with; cached for the measurements that follow.

    Raises: EdmDistillError: statistics that lack what a metric needs, or are of other weights.
    """
    keys, record = panel.keys, describe_reference(reference)
    if isinstance(reference, Dataset):
        collected, digest = _collect(dataset_images(reference), keys, panel, reference.content_sha256)
        return Collected(collected, replace(record, sha256=digest))
    if not reference.spaces:
        collected, digest = _collect(open_images(reference.path, 0), keys, panel, reference.sha256)
        return Collected(collected, replace(record, sha256=digest))
    stated, pictured = stated_by(reference, panel)
    if pictured:
        stated |= _collect(open_images(reference.path, 0), pictured, panel, reference.sha256)[0]
    counts = [
        len(collected) if isinstance(collected, FeatureSet) else collected.n
        for key, collected in stated.items()
        if key in pictured or isinstance(collected, FeatureSet)
    ]
    kept = min(counts, default=reference.n)
    return Collected(stated, record if kept in (None, reference.n) else replace(record, kept=kept))


def stated_by(reference: ReferenceStatistics, panel: Panel) -> tuple[dict[Key, Any], Keys]:
    """Returns what statistics hold of what a panel compares with, and what is to be measured of their images.

    ADM's files hold statistics, of which FID is to be measured, and some of the images, which give all else.

    Raises: EdmDistillError: they lack what a metric needs, or are of other weights.
    """
    pictured = {
        (name, kind)
        for name, kind in panel.keys
        if reference.has_images and kind is not Nothing and (kind is Features or name not in reference.spaces)
    }
    spaces = panel.spaces
    return {(name, kind): reference.collected(spaces[name], kind) for name, kind in panel.keys - pictured}, pictured


def _collect(images: Images, keys: Keys, panel: Panel, identity: str) -> tuple[dict[Key, Any], str]:
    """Returns what accumulators collect of real images, and the sha256 of their pixels; on other processes nothing."""
    spaces = {name: space for name, space in panel.spaces.items() if name in {name for name, _ in keys}}
    weights, main = {name: space.sha256 for name, space in spaces.items()}, panel.processes.rank == 0
    folder = None
    if panel.work is not None:
        folder = panel.work.folder({"reference": identity, "weights": weights}, panel.processes, several=True)
    accumulators = {(name, kind): kind() for name, kind in keys}
    digests: list[Tensor] = []
    measure = partial(measure_images, images, spaces, device=panel.device, digests=True)
    with progress_bar(images.count, desc="reference") as bar:
        show = bar.update if main else lambda count: None
        for _, arrays in measure_all(
            images.count, images.block, measure, folder=folder, processes=panel.processes, on_progress=show
        ):
            digests.append(arrays[DIGEST])
            for (name, _), accumulator in accumulators.items():
                accumulator.update(arrays[f"{name}/features"].to(panel.device))
    if not main:
        return {}, ""
    finished = {key: accumulator.finish() for key, accumulator in accumulators.items()}
    return finished, pixels_sha256(images.size, torch.cat(digests))


@lru_cache(maxsize=4)
def _load_space(name: str, weights: str | None, device: str) -> FeatureSpace:
    return load_features(name, weights, device)


def require_finite_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics if all are finite.  Raises NotFiniteError, naming the one that is not."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}: the network or the features overflow, and nothing was measured")
    return metrics
