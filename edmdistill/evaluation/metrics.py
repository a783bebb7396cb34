"""The table of metrics. Each is a class that reads a measurement batch by batch, and then gives its value.

A metric that may be measured in any feature space is named after the space too: fd_dinov2, precision_inception. One
that belongs to a single space has a name of its own, which then stands for both: the Frechet and the kernel distance in
Inception's features are fid and kid.
"""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple

from edmdistill.embedded import EMBEDDED
from edmdistill.errors import EdmDistillError, did_you_mean
from edmdistill.evaluation.base import Accumulator, Measured, Metric, Nothing
from edmdistill.evaluation.frechet import FrechetDistance
from edmdistill.evaluation.inception_score import InceptionScore
from edmdistill.evaluation.kernel_distance import KernelDistance
from edmdistill.evaluation.manifold import Coverage, Density, Precision, Recall
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import FEATURE_SPACES


class ClassAccuracy:
    """The share of images that the classifier assigns to the class they were sampled with."""

    reference: ClassVar[type[Accumulator]] = Nothing
    needs: ClassVar = frozenset({"logits", "labels"})

    def __init__(self, reference: None = None) -> None:
        self._correct = self._count = 0

    def update(self, batch: Measured) -> None:
        assert batch.logits is not None
        assert batch.labels is not None
        self._correct += int((batch.logits.argmax(1).cpu() == batch.labels).sum())
        self._count += len(batch.labels)

    def finish(self) -> float:
        return self._correct / self._count


class MetricKind(NamedTuple):
    """A line of METRICS.

    Attributes:
        metric: its class.
        features: the feature spaces that it belongs to, where it is named without one; none: it is named after its
            space, by default the protocol's own.
    """

    metric: type[Metric]
    features: tuple[str, ...] = ()


METRICS: dict[str, MetricKind] = {
    "fid": MetricKind(FrechetDistance, ("inception",)),
    "fd": MetricKind(FrechetDistance),
    "kid": MetricKind(KernelDistance, ("inception",)),
    "kd": MetricKind(KernelDistance),
    "is": MetricKind(InceptionScore, ("inception",)),
    "precision": MetricKind(Precision),
    "recall": MetricKind(Recall),
    "density": MetricKind(Density),
    "coverage": MetricKind(Coverage),
    "class_accuracy": MetricKind(ClassAccuracy, tuple(EMBEDDED)),
}


HIGHER_IS_BETTER = "is", "precision", "recall", "density", "coverage", "class_accuracy"


def loss_of(name: str, value: float) -> float:
    """Returns a number that is lower for a better value of a metric.

    Args:
        name: in results, such as fid@5000 or precision_dinov2.
    """
    kind = re.split(r"[\[@]", name)[0]
    return -value if any(kind == one or kind.startswith(f"{one}_") for one in HIGHER_IS_BETTER) else value


class FoundMetric(NamedTuple):
    """A metric in a feature space.

    Attributes:
        name: the one by which results know it, whichever was asked for: fid for fd_inception.
        metric: its class.
        features: the name of the space.
    """

    name: str
    metric: type[Metric]
    features: str


def find_metric(name: str, features: str) -> FoundMetric:
    """Returns the metric of a name: a key of METRICS, or one with the name of a feature space after it, as fd_dinov2.

    Args:
        features: the protocol's own space, in which a metric of any space is measured unless its name says another.
    Raises: EdmDistillError: there is none.
    """
    if name in METRICS:
        metric, homes = METRICS[name]
        space = features if features in homes or not homes else homes[0]
    else:
        free = [kind for kind, entry in METRICS.items() if not entry.features]
        names = {f"{kind}_{space}": (kind, space) for kind in free for space in FEATURE_SPACES}
        if name not in names:
            if name == "nll":
                raise EdmDistillError("nll is measured alone and without a protocol, by `eval --metrics nll`")
            raise EdmDistillError(f"there is no metric {name!r}; {did_you_mean(name, [*METRICS, *names], most=20)}")
        name, space = names[name]
        metric = METRICS[name].metric
    aliases = (alias for alias, kind in METRICS.items() if kind.metric is metric and space in kind.features)
    return FoundMetric(next(aliases, f"{name}_{space}"), metric, space)


def metric_label(name: str, space: FeatureSpace, n: int, standard_n: int) -> str:
    """Returns the name of a metric in results, which is the bare one only for the standard measurement.

    Other weights than the official ones are named by the first eight digits of their sha256, and another number of
    images by that number: fid, fid@5000, fid[1a2b3c4d], fid[1a2b3c4d]@5000.

    Args:
        name: a FoundMetric's.
        space: in which it was measured.
        n, standard_n: the number of images, and the one that the protocol asks for.
    """
    weights = "" if space.official else f"[{(space.sha256 or '')[:8]}]"
    return f"{name}{weights}" + ("" if n == standard_n else f"@{n}")
