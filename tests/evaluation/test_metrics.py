"""The table of metrics: a metric is one class and one line, and evaluate asks it for no more than it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.base import ComparingMetric, Measured
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.metrics import METRICS, ClassAccuracy, MetricKind, find_metric, metric_label
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.features.spaces import Pixels, load_features


class Mean:
    """The mean of all features."""

    def __init__(self) -> None:
        self.total = self.count = 0.0

    def update(self, features: Tensor) -> None:
        self.total += float(features.double().sum())
        self.count += features.numel()

    def finish(self) -> float:
        return self.total / self.count


class MeanDifference(ComparingMetric):
    """How far the means of all features are apart."""

    reference = Mean

    @staticmethod
    def compare(real: float, generated: float) -> float:
        return generated - real


def test_a_new_metric_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "mean", MetricKind(MeanDifference))
    standard = PROTOCOLS["pixels"]
    monkeypatch.setitem(PROTOCOLS, "pixels", replace(standard, metrics=("mean_pixels", "fd_pixels")))
    data = open_dataset("digits")
    result = evaluate(torch.full((5, 1, 8, 8), 255, dtype=torch.uint8), data, protocol="pixels")
    assert list(result.metrics) == ["mean_pixels@5", "fd_pixels@5"]
    expected = 1 - float(Pixels()(data.images(range(len(data)))).mean())
    assert result.metrics["mean_pixels@5"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_every_protocol_finds_its_metrics_by_the_names_of_results(protocol: Any) -> None:
    assert tuple(find_metric(name, protocol.features).name for name in protocol.metrics) == protocol.metrics


def test_a_name_says_the_feature_space() -> None:
    assert find_metric("fd", "digits") == find_metric("fd_digits", "pixels")
    assert find_metric("fd_digits", "pixels").features == "digits"
    assert find_metric("fid", "digits") == find_metric("fd", "inception")
    assert find_metric("fd", "inception").name == "fid"


@pytest.mark.parametrize("name", ["fad", "fd_", "fid_digits", "class_accuracy_pixels", "_digits", ""])
def test_a_metric_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(EdmDistillError, match=f"there is no metric '{name}'; (did you mean|choose one of fid, fd, )"):
        find_metric(name, "digits")


def test_only_the_standard_measurement_has_the_bare_name(tmp_path: Path) -> None:
    copy = tmp_path / "weights.safetensors"
    save_tensors(copy, load_tensors(EMBEDDED["digits"].features)[0])  # without the official file's metadata
    other = load_features("digits", copy)
    assert other.sha256 is not None
    weights = f"[{other.sha256[:8]}]"
    labels = [
        metric_label("fd_digits", space, n, 5000) for space in (load_features("digits"), other) for n in (5000, 100)
    ]
    assert labels == ["fd_digits", "fd_digits@100", f"fd_digits{weights}", f"fd_digits{weights}@100"]


def test_accuracy_is_the_share_over_all_batches() -> None:
    logits, metric = torch.eye(10).repeat(10, 1), ClassAccuracy()
    labels = logits.argmax(1)
    labels[:30] += 1
    for rows in (slice(30), slice(30, 100)):
        metric.update(Measured(torch.zeros(0), logits[rows], labels[rows]))
    assert metric.finish() == 0.7
