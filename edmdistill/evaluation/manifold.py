"""Precision and recall, density and coverage: images against balls that reach to the k-th nearest image of a set.

All four keep the features of both sets in memory, in float32, those of generated images twice while they are compared:
4 (N + 2 M) d bytes. Distances are computed in tiles, in float64.
"""

from __future__ import annotations

from torch import Tensor

from edmdistill.evaluation.feature_set import FeatureSet, FeaturesMetric, count_inside

PRECISION_K = 3
"""Kynkäänniemi et al. 2019, section 2."""
DENSITY_K = 5
"""Naeem et al. 2020, section 4."""


def precision_recall(real: Tensor, generated: Tensor, k: int = PRECISION_K) -> tuple[float, float]:
    """Returns improved precision and recall.

    precision = mean_j 1[ |y_j - x_i| <= |x_i - NN_k(x_i)| for some i ], x real, y generated; recall exchanges the sets

    Args:
        real, generated: features.  [N,d], [M,d]
        k: which nearest other feature of its set a ball reaches to.
    Raises: EdmDistillError: a set has no more than k features.
    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.
    """
    x, y = FeatureSet(real.float()), FeatureSet(generated.float())
    return _covered(x, y, k), _covered(y, x, k)


def density_coverage(real: Tensor, generated: Tensor, k: int = DENSITY_K) -> tuple[float, float]:
    """Returns density and coverage.

    density = sum_ij 1[ |y_j - x_i| < |x_i - NN_k(x_i)| ] / (k M),  coverage = mean_i 1[ some j is in the ball of x_i ]

    Args:
        real, generated: features.  [N,d], [M,d]
        k: which nearest other real feature a ball reaches to.
    Raises: EdmDistillError: there are no more than k real features.
    Source: Naeem et al. 2020 (arXiv 2002.09797), equations 3 and 4; a border is outside, as in the authors' code.
    """
    return _density_coverage(FeatureSet(real.float()), FeatureSet(generated.float()), k)


def _covered(centers: FeatureSet, points: FeatureSet, k: int) -> float:
    """Returns the share of points that are in the ball of some center."""
    return float((count_inside(centers, k, points, border=True)[0] > 0).double().mean())


def _density_coverage(real: FeatureSet, generated: FeatureSet, k: int) -> tuple[float, float]:
    balls, members = count_inside(real, k, generated, border=False)
    return float(balls.double().mean()) / k, float((members > 0).double().mean())


class Precision(FeaturesMetric):
    """The share of generated images in the ball of a real one."""

    @staticmethod
    def compare(real: FeatureSet, generated: FeatureSet) -> float:
        return _covered(real, generated, PRECISION_K)


class Recall(FeaturesMetric):
    """The share of real images in the ball of a generated one."""

    @staticmethod
    def compare(real: FeatureSet, generated: FeatureSet) -> float:
        return _covered(generated, real, PRECISION_K)


class Density(FeaturesMetric):
    """The number of real images in whose ball a generated one is, over k."""

    @staticmethod
    def compare(real: FeatureSet, generated: FeatureSet) -> float:
        return _density_coverage(real, generated, DENSITY_K)[0]


class Coverage(FeaturesMetric):
    """The share of real images in whose ball a generated one is."""

    @staticmethod
    def compare(real: FeatureSet, generated: FeatureSet) -> float:
        return _density_coverage(real, generated, DENSITY_K)[1]
