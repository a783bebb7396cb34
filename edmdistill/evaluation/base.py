"""The interface of metrics: what they read of the images that are measured, and what they collect of the real ones."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Some of the images that are measured, in one feature space.

    Attributes:
        features: float32 [B,d]
        logits: of the space's classifier, float32 [B,K]; None where no metric needs them or the space has none.
        labels: the classes that the images were sampled with, int64 [B]; None where they are unknown.
    """

    features: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None


class Accumulator(Protocol):
    """Collects what a metric compares with."""

    def update(self, features: Tensor) -> None:
        """Adds features of real images.  [B,d]"""
        ...

    def finish(self) -> Any:
        """Returns what was collected."""
        ...


class Nothing:
    """The accumulator of a metric that compares with nothing."""

    def update(self, features: Tensor) -> None: ...

    def finish(self) -> None: ...


class Metric(Protocol):
    """A metric of one measurement. Its value does not depend on how the images are split into batches.

    Attributes:
        reference: collects, from the features of the real images, what the metric compares with.
        needs: what it reads of Measured beside features: any of logits, labels.
    """

    reference: ClassVar[type[Accumulator]]
    needs: ClassVar[frozenset[str]]

    def __init__(self, reference: Any) -> None:
        """Args: reference: the result of its accumulator."""

    def update(self, batch: Measured) -> None:
        """Adds images; those of all calls are in the order of their seeds."""
        ...

    def finish(self) -> float:
        """Returns the metric of all images so far."""
        ...


class ComparingMetric(Metric):
    """A metric that collects the same of both sets, by its accumulator `reference`, and compares the two."""

    reference: ClassVar[type[Accumulator]]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, reference: Any) -> None:
        self._real, self._generated = reference, type(self).reference()

    def update(self, batch: Measured) -> None:
        self._generated.update(batch.features)

    def finish(self) -> float:
        return self.compare(self._real, self._generated.finish())

    @staticmethod
    @abstractmethod
    def compare(real: Any, generated: Any) -> float:
        """Returns the metric of what was collected of the real and of the generated images."""
