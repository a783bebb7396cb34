"""The table of metrics: a metric is one class and one line, and evaluate asks it for no more than it needs."""

from typing import Any, ClassVar

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.data.datasets import open_dataset
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.metrics import METRICS, Accumulator, Batch, ClassAccuracy, find_metric
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.features.spaces import Digits, Pixels

TEST = open_dataset("digits", split="test")


class Mean:
    """The mean of all features."""

    def __init__(self) -> None:
        self.total = self.count = 0.0

    def update(self, features: Tensor) -> None:
        self.total += float(features.double().sum())
        self.count += features.numel()

    def finish(self) -> float:
        return self.total / self.count


class MeanDifference:
    """How far the means of all features are apart."""

    reference: ClassVar[type[Accumulator]] = Mean
    needs_labels: ClassVar = False

    def __init__(self, reference: float) -> None:
        self.theirs, self.ours = reference, Mean()

    def update(self, batch: Batch) -> None:
        self.ours.update(batch.features)

    def finish(self) -> float:
        return self.ours.finish() - self.theirs


def test_a_new_metric_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "mean", MeanDifference)
    standard = PROTOCOLS["pixels"]
    monkeypatch.setitem(PROTOCOLS, "pixels", replace(standard, metrics=("mean_pixels", "fd_pixels")))
    data = open_dataset("digits")
    result = evaluate(torch.full((5, 1, 8, 8), 255, dtype=torch.uint8), data, protocol="pixels", batch=2)
    assert list(result.metrics) == ["mean_pixels@5", "fd_pixels@5"]
    expected = 1 - float(Pixels()(data.images(range(len(data)))).mean())
    assert result.metrics["mean_pixels@5"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_every_protocol_finds_its_metrics(protocol: Any) -> None:
    assert all(find_metric(name, protocol.features) in METRICS.values() for name in protocol.metrics)


@pytest.mark.parametrize("name", ["fid", "fd_inception", "fd_"])
def test_a_metric_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(EdmDistillError, match=f"there is no metric '{name}'; choose one of fd, class_accuracy"):
        find_metric(name, "digits")


def test_accuracy_is_the_share_over_all_batches() -> None:
    pixels = TEST.images(range(100))
    space, metric = Digits(), ClassAccuracy()
    right = space.classify(pixels).argmax(1)
    for rows in (range(30), range(30, 100)):
        metric.update(Batch(space, pixels[rows.start : rows.stop], right[rows.start : rows.stop] + (rows.start == 0)))
    assert metric.finish() == 0.7


def test_what_no_metric_reads_is_not_computed() -> None:
    def space(pixels: Tensor) -> Tensor:
        raise AssertionError("features were computed")

    batch = Batch(space, torch.zeros(4, 1, 8, 8, dtype=torch.uint8))  # type: ignore[arg-type]
    assert len(batch) == 4
    with pytest.raises(AssertionError, match="features were computed"):
        batch.features  # noqa: B018
