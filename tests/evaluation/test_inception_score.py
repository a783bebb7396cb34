"""The Inception score of known distributions, and its splits."""

import math

import pytest
import torch
from torch import Tensor

from edmdistill.evaluation.base import Measured
from edmdistill.evaluation.inception_score import InceptionScore, inception_score, inception_scores


def certain(classes: Tensor, k: int) -> Tensor:
    """The logits of a classifier that is certain."""
    return torch.where(torch.eye(k, dtype=torch.bool)[classes], 0.0, -torch.inf)


@pytest.mark.parametrize("used", [1, 3, 10])
def test_of_certain_images_it_counts_the_classes(used: int) -> None:
    assert inception_score(certain(torch.arange(60) % used, 10)) == pytest.approx(used, rel=1e-12)


def test_of_uncertain_images_it_is_one() -> None:
    assert inception_score(torch.full((50, 7), 3.0)) == pytest.approx(1, rel=1e-12)


def test_of_a_noisy_classifier() -> None:
    """Balanced classes, each found with p = a and each other with b: ln K + a ln a + (K - 1) b ln b."""
    k, a = 5, 0.8
    b = (1 - a) / (k - 1)
    logits = torch.where(torch.eye(k, dtype=torch.bool), a, b).double().log().repeat(20, 1)
    expected = math.exp(math.log(k) + a * math.log(a) + (k - 1) * b * math.log(b))
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


def naive(logits: Tensor) -> float:
    p = logits.double().softmax(1)
    return float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())


def test_each_split_has_its_own_marginal_and_the_rest_joins_the_last() -> None:
    logits = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
    expected = [naive(logits[:10]), naive(logits[10:])]
    torch.testing.assert_close(inception_scores(logits, split=10), torch.tensor(expected, dtype=torch.float64))
    assert inception_score(logits, split=10) == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert inception_score(logits, split=50) == pytest.approx(naive(logits), rel=1e-12)


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [9, 0, 14]])
def test_any_batches_give_the_same(sizes: list[int]) -> None:
    logits = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(split=5)
    for batch in logits.split(sizes):
        metric.update(Measured(torch.zeros(len(batch), 2), batch))
    assert metric.finish() == pytest.approx(inception_score(logits, split=5), rel=1e-12)
