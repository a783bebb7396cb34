"""Metrics of images: each reads a measurement batch by batch, and then gives its value.

METRICS lists them. A metric of features is named after its feature space too: fd_digits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance
from edmdistill.features.spaces import Classifier, FeatureSpace


class Batch:
    """Some of the images that are measured; what no metric reads of them is not computed.

    Args:
        pixels: uint8 [B,C,H,W]
        labels: the classes that they were sampled with, int64 [B] on the CPU; None where they are unknown.
    """

    def __init__(self, space: FeatureSpace, pixels: Tensor, labels: Tensor | None = None) -> None:
        self._space, self._pixels = space, pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self._pixels)

    @cached_property
    def features(self) -> Tensor:
        """float32 [B,d]"""
        return self._space(self._pixels)

    @cached_property
    def probabilities(self) -> Tensor:
        """The classifier's, float32 [B,classes]."""
        assert isinstance(self._space, Classifier)
        return self._space.classify(self._pixels)


class Accumulator(Protocol):
    """Collects what a metric compares with."""

    def update(self, features: Tensor) -> None:
        """Adds features of real images.  [N,d]"""
        ...

    def finish(self) -> Any:
        """Returns what was collected."""
        ...


class Nothing:
    """The accumulator of a metric that compares with nothing."""

    def update(self, features: Tensor) -> None: ...

    def finish(self) -> None: ...


class Metric(Protocol):
    """A metric of one measurement.

    Attributes:
        reference: collects, from the features of the real images, what the metric compares with.
        needs_labels: whether it takes a space that classifies, and images whose classes are known.
    """

    reference: ClassVar[type[Accumulator]]
    needs_labels: ClassVar[bool]

    def __init__(self, reference: Any) -> None:
        """Args: reference: the result of its accumulator."""

    def update(self, batch: Batch) -> None:
        """Adds images."""
        ...

    def finish(self) -> float:
        """Returns the metric of all images so far."""
        ...


class FrechetDistance:
    """The squared Frechet distance of Gaussians fitted to the features of both sets; see evaluation.frechet."""

    reference: ClassVar[type[Accumulator]] = RunningStatistics
    needs_labels: ClassVar = False

    def __init__(self, reference: GaussianStatistics) -> None:
        self._reference, self._statistics = reference, RunningStatistics()

    def update(self, batch: Batch) -> None:
        self._statistics.update(batch.features)

    def finish(self) -> float:
        return frechet_distance(self._statistics.finish(), self._reference)


class ClassAccuracy:
    """The share of images that the classifier assigns to the class they were sampled with."""

    reference: ClassVar[type[Accumulator]] = Nothing
    needs_labels: ClassVar = True

    def __init__(self, reference: None = None) -> None:
        self._correct = self._count = 0

    def update(self, batch: Batch) -> None:
        assert batch.labels is not None
        self._correct += int((batch.probabilities.argmax(1).cpu() == batch.labels).sum())
        self._count += len(batch)

    def finish(self) -> float:
        return self._correct / self._count


METRICS: dict[str, type[Metric]] = {"fd": FrechetDistance, "class_accuracy": ClassAccuracy}


def find_metric(name: str, features: str) -> type[Metric]:
    """Returns the metric of that name in a feature space, such as fd_digits in digits.

    Raises EdmDistillError if there is none.
    """
    kind = name.removesuffix(f"_{features}")
    if kind not in METRICS:
        raise EdmDistillError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}")
    return METRICS[kind]
