"""Precision and recall, density and coverage: sets made by hand, the authors' formulas, and what must not matter."""

import pytest
import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.evaluation import feature_set
from edmdistill.evaluation.base import Measured
from edmdistill.evaluation.feature_set import FeatureSet
from edmdistill.evaluation.manifold import Coverage, Density, Precision, Recall, density_coverage, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(real: Tensor, generated: Tensor, k: int, kd: int) -> list[float]:
    """All distances at once, as the papers write them."""
    real, generated = real.double(), generated.double()

    def radius(x: Tensor, k: int) -> Tensor:
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]

    cross = torch.cdist(real, generated, compute_mode="donot_use_mm_for_euclid_dist")
    precision = (cross <= radius(real, k)[:, None]).any(0)
    recall = (cross <= radius(generated, k)).any(1)
    balls = cross < radius(real, kd)[:, None]
    return [float(x.double().mean()) for x in (precision, recall, balls.sum(0).double() / kd, balls.any(1))]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "TILE", 7)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1000.0])
def test_equals_the_formulas_on_all_distances(small_tiles: None, shift: float) -> None:
    real, generated = normal(61, 4) + shift, normal(50, 4, seed=1) * 0.8 + 0.3 + shift
    found = [*precision_recall(real, generated, 3), *density_coverage(real, generated, 5)]
    assert found == pytest.approx(naive(real, generated, 3, 5), abs=1e-12)
    assert 0.1 < min(found) < max(found) < 2


def test_sets_made_by_hand() -> None:
    """On a line, with k = 1, the ball of each of 0, 1, 10 and 12 reaches to 1, 0, 12 and 10."""
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    generated = torch.tensor([[1.5], [1.6], [20.0]])
    assert precision_recall(real, generated, k=1) == (2 / 3, 0.5)  # the ball of 20 reaches to 1.6
    assert precision_recall(generated, real, k=1) == (0.5, 2 / 3)
    # 1.5 and 1.6 are in the ball of 1 alone, at 0 to 2; nothing is in the other balls.
    assert density_coverage(real, generated, k=1) == (2 / 3, 1 / 4)


def test_a_border_is_inside_for_precision_and_outside_for_density() -> None:
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [0.0]])
    assert precision_recall(real, generated, k=1) == (1.0, 1.0)
    assert density_coverage(real, generated, k=1) == (0.5, 0.5)


def test_copies_have_balls_of_radius_zero() -> None:
    """Which hold the copies themselves, on their border."""
    real = normal(1, 50).expand(9, 50)
    assert precision_recall(real, real[:5]) == (1.0, 1.0)
    assert precision_recall(real, real[:5] + 1e-3) == (0.0, 0.0)
    assert density_coverage(real, real[:5]) == (0.0, 0.0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_set_covers_itself_with_density_one(small_tiles: None, offset: float) -> None:
    """Each ball holds its center and k - 1 others, and the k-th lies on its border, whatever the rounding."""
    x = normal(40, 6) + offset
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert density_coverage(x, x.flip(0)) == (1.0, 1.0)


def test_far_apart_nothing_is_covered() -> None:
    assert precision_recall(normal(20, 3), normal(20, 3, seed=1) + 100) == (0.0, 0.0)
    assert density_coverage(normal(20, 3), normal(20, 3, seed=1) + 100) == (0.0, 0.0)


def test_expected_coverage_of_a_perfect_generator() -> None:
    """1 - (N-1)...(N-k) / (M+N-1)...(M+N-k), Naeem et al., lemma 2; the density is 1."""
    n, k, densities, coverages = 30, 3, [], []
    for seed in range(200):
        both = normal(2 * n, 2, seed=seed)
        density, coverage = density_coverage(both[:n], both[n:], k)
        densities.append(density)
        coverages.append(coverage)
    expected = 1.0
    for i in range(1, k + 1):
        expected *= (n - i) / (2 * n - i)
    assert torch.tensor(coverages).mean() == pytest.approx(1 - expected, abs=0.02)
    assert torch.tensor(densities).mean() == pytest.approx(1, abs=0.03)


def test_metrics_are_the_functions_in_any_batches(small_tiles: None) -> None:
    real, generated = normal(30, 3), normal(23, 3, seed=1)
    reference = FeatureSet(real)
    for sizes in ([23], [1, 4, 18], [0, 23]):
        found = []
        for kind in (Precision, Recall, Density, Coverage):
            metric = kind(reference)
            for batch in generated.split(sizes):
                metric.update(Measured(batch))
            found.append(metric.finish())
        assert found == [*precision_recall(real, generated), *density_coverage(real, generated)]


def test_features_that_are_not_finite_are_refused() -> None:
    metric = Precision(FeatureSet(normal(30, 3)))
    metric.update(Measured(torch.tensor([[0.0, torch.nan, 1.0]])))
    with pytest.raises(NotFiniteError, match="features of images are NaN or infinite"):
        metric.finish()


def test_radii_of_the_real_images_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = FeatureSet(normal(30, 3))
    first = reference.squared_radii(3)
    monkeypatch.setattr(feature_set, "_squared_radii", lambda values, k: pytest.fail("computed again"))
    assert reference.squared_radii(3) is first


def test_too_few_images_have_no_neighbors() -> None:
    with pytest.raises(EdmDistillError, match="the 3 nearest neighbors of an image need more than 3 images, but there"):
        precision_recall(normal(3, 2), normal(9, 2))
