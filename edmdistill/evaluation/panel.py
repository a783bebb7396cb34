"""The metrics of an evaluation, measured together: every image is drawn and put through each feature space once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edmdistill.data.datasets import Dataset
from edmdistill.errors import NotFiniteError
from edmdistill.evaluation.base import Accumulator, Measured
from edmdistill.evaluation.images import Images
from edmdistill.evaluation.metrics import FoundMetric
from edmdistill.evaluation.pipeline import DIGEST, measure_images, pixels_sha256
from edmdistill.evaluation.protocol import Reference
from edmdistill.evaluation.shards import ONE_PROCESS, MeasuredBatch, Processes, Work, measure_all
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import load_features
from edmdistill.progress import progress_bar


class Collected(NamedTuple):
    """What metrics compare with: by feature space and kind of accumulator, and the reference's record."""

    by_space: Mapping[tuple[str, type[Accumulator]], Any]
    reference: Reference


@dataclass(frozen=True)
class Panel:
    """The metrics of an evaluation.

    Attributes:
        metrics: what is measured.
        weights: files of feature spaces, by name; others have their official weights.
        device: of the feature spaces.
        batch: images at a time.
        work: where features are kept, or None.
        processes: that share the work.
    """

    metrics: tuple[FoundMetric, ...]
    weights: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    batch: int = 256
    work: Work | None = None
    processes: Processes = ONE_PROCESS

    @property
    def spaces(self) -> dict[str, FeatureSpace]:
        """The feature spaces by name."""
        files = dict(self.weights)
        names = dict.fromkeys(metric.features for metric in self.metrics)
        return {name: _load_space(name, files.get(name), self.device) for name in names}

    def values(
        self,
        images: Images,
        collected: Collected,
        folder: Path | None,
        on_progress: Callable[[int], object],
    ) -> dict[str, float]:
        """Returns the metrics of images by name; on the main process alone, on others nothing.

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
        for rows, arrays in self._measure(images.count, measure, folder, on_progress):
            labels = None if images.classes is None else images.classes[rows.start : rows.stop]
            for one, metric in metrics:
                features, scores = (arrays.get(f"{one.features}/{kind}") for kind in ("features", "logits"))
                assert features is not None
                metric.update(Measured(features.to(self.device), scores, labels))
        return require_finite_metrics({one.name: metric.finish() for one, metric in metrics})

    def _measure(
        self,
        count: int,
        measure: Callable[[Iterable[range]], Iterable[MeasuredBatch]],
        folder: Path | None,
        on_progress: Callable[[int], object] = lambda count: None,
    ) -> Iterable[MeasuredBatch]:
        return measure_all(count, self.batch, measure, folder=folder, processes=self.processes, on_progress=on_progress)


@lru_cache(maxsize=4)
def collect_reference(data: Dataset, panel: Panel) -> Collected:
    """Returns what the metrics of a panel compare with; cached for the measurements that follow."""
    size = (data.img_channels, data.img_resolution, data.img_resolution)
    images = Images(len(data), size, data.images, None, None, "unknown", identity=lambda: data.content_sha256)
    spaces, folder = panel.spaces, None
    if panel.work is not None:
        weights = {name: space.sha256 for name, space in spaces.items()}
        folder = panel.work.folder({"reference": data.content_sha256, "weights": weights}, panel.processes)
    main = panel.processes.rank == 0
    keys = {(one.features, one.metric.reference) for one in panel.metrics}
    accumulators = {(name, kind): kind() for name, kind in keys}
    digests: list[Tensor] = []
    measure = partial(measure_images, images, spaces, device=panel.device, digests=True)
    with progress_bar(len(data), desc="reference") as bar:
        for _, arrays in panel._measure(len(data), measure, folder, bar.update if main else lambda count: None):
            digests.append(arrays[DIGEST])
            for (name, _), accumulator in accumulators.items():
                accumulator.update(arrays[f"{name}/features"].to(panel.device))
    found = {key: accumulator.finish() for key, accumulator in accumulators.items() if main}
    digest = pixels_sha256(size, torch.cat(digests)) if main else None
    return Collected(found, Reference(source=Path(data.name).name, split=data.split, n=len(data), sha256=digest))


@lru_cache(maxsize=4)
def _load_space(name: str, weights: str | None, device: str) -> FeatureSpace:
    return load_features(name, weights, device)


def require_finite_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics if all are finite.  Raises NotFiniteError, naming the one that is not."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}: the network or the features overflow, and nothing was measured")
    return metrics
