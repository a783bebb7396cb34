"""The kernel distance: closed forms by moments, and torchmetrics."""

import math

import pytest
import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.base import Measured
from edmdistill.evaluation.feature_set import FeatureSet
from edmdistill.evaluation.kernel_distance import KernelDistance, kernel_distance, kernel_distances


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor) -> list[Tensor]:
    """The means of 1, x, x x^T and x x x."""
    n = len(x)
    return [x.new_ones(1), x.mean(0), x.T @ x / n, torch.einsum("ni,nj,nk->ijk", x, x, x) / n]


def test_of_whole_sets_it_is_a_sum_over_moments() -> None:
    """(x.y / d + 1)^3 = sum_r binom(3, r) x^r . y^r / d^r, so means over pairs are products of moments."""
    x, y, d = normal(40, 4), 0.5 * normal(40, 4, seed=1) + 1, 4

    def mean(a: Tensor, b: Tensor) -> Tensor:
        terms = zip(moments(a), moments(b), strict=True)
        return sum(math.comb(3, r) * (p * q).sum() / d**r for r, (p, q) in enumerate(terms))  # type: ignore[return-value]

    def unbiased(a: Tensor) -> Tensor:
        diagonal = (a.square().sum(1) / d + 1).pow(3).sum()
        return (len(a) ** 2 * mean(a, a) - diagonal) / (len(a) * (len(a) - 1))

    expected = unbiased(x) + unbiased(y) - 2 * mean(x, y)
    assert kernel_distance(x, y, subsets=3) == pytest.approx(float(expected), rel=1e-12)


def test_expectation_between_gaussians() -> None:
    """On a line: MMD^2 = 3 (E x - E y)^2 + 3 (E x^2 - E y^2)^2 + (E x^3 - E y^3)^2."""
    mean, std = 0.7, 0.6
    x, y = normal(4000, 1), mean + std * normal(4000, 1, seed=1)
    theirs = mean, mean**2 + std**2, mean**3 + 3 * mean * std**2
    expected = 3 * theirs[0] ** 2 + 3 * (theirs[1] - 1) ** 2 + theirs[2] ** 2
    found = kernel_distances(x, y, subsets=100, size=300)
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(expected, abs=5 * error)
    assert error < 0.05 * expected


def test_unbiased_between_equal_distributions() -> None:
    found = kernel_distances(normal(4000, 8), normal(4000, 8, seed=1), subsets=50, size=100)
    assert (found < 0).any()
    assert abs(float(found.mean())) < float(found.std())


def test_subsets_are_drawn_without_replacement_and_differ() -> None:
    x = torch.arange(50.0, dtype=torch.float64)[:, None]
    whole = kernel_distances(x, x + 1, subsets=4)
    torch.testing.assert_close(whole, whole[:1].expand(4), rtol=1e-9, atol=0)
    assert len(kernel_distances(x, x + 1, subsets=4, size=10).unique()) == 4


def test_subsets_of_the_two_sets_are_drawn_apart() -> None:
    """Of a set and itself, equal subsets would always give less than 0: each row would be near itself."""
    x = normal(4000, 8)
    assert (kernel_distances(x, x, subsets=50, size=100) > 0).double().mean() > 0.1


def test_the_metric_is_the_function_in_any_batches() -> None:
    real, generated = normal(60, 3).float(), normal(50, 3, seed=1).float()
    for sizes in ([50], [1] * 20 + [30]):
        metric = KernelDistance(FeatureSet(real))
        for batch in generated.split(sizes):
            metric.update(Measured(batch))
        assert metric.finish() == kernel_distance(real, generated)


def test_one_image_has_no_distance() -> None:
    with pytest.raises(EdmDistillError, match="at least two images of each set, but there is only 1"):
        kernel_distance(normal(9, 2), normal(1, 2))
