"""The kernel (Inception) distance: an unbiased estimate of the squared maximum mean discrepancy, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.feature_set import FeatureSet, FeaturesMetric
from edmdistill.evaluation.frechet import gram
from edmdistill.progress import progress_bar

SUBSETS, SIZE = 100, 1000
"""As Binkowski et al. and torch-fidelity have them."""


def kernel_distances(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SIZE) -> Tensor:
    """Returns the unbiased squared maximum mean discrepancy of each of `subsets` pairs of subsets.

    The kernel is k(x, y) = (x.y / d + 1)^3. A subset is `size` rows drawn without replacement, or all of the smaller
    set where that has fewer; which rows depends on the number of the subset and on the length of the set alone.

    Args:
        x, y: features.  [N,d], [M,d]
    Returns: float64 [subsets]; the distance is their mean, and their spread is what papers give after +-.
    Raises: EdmDistillError: a set has fewer than two features.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012, equation 3.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise EdmDistillError(f"a kernel distance needs at least two images of each set, but there is only {size}")
    numbers = progress_bar(subsets, "kernel distance", "subset", iterable=range(subsets))
    return torch.stack(
        [_squared_mmd(x[_rows(2 * i, len(x), size)], y[_rows(2 * i + 1, len(y), size)]) for i in numbers]
    )


def kernel_distance(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SIZE) -> float:
    """Returns the mean of `kernel_distances`."""
    return float(kernel_distances(x, y, subsets, size).mean())


def _rows(subset: int, count: int, size: int) -> Tensor:
    """Draws `size` of `count` rows without replacement.  int64 [size]"""
    return Draws(subset, count).uniform().argsort()[:size]


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """[n,d], [n,d] -> float64 []"""
    x, y, n = x.double(), y.double(), len(x)
    kernels = [_kernel(gram(z.T), z.shape[1]) for z in (x, y)]
    within = sum(kernel.sum() - kernel.trace() for kernel in kernels) / (n * (n - 1))
    return within - 2 * _kernel(x @ y.T, x.shape[1]).mean()


def _kernel(products: Tensor, d: int) -> Tensor:
    """Returns the kernel of pairs from their scalar products, which it overwrites."""
    kernel = products.div_(d).add_(1)
    return kernel.square().mul_(kernel)


class KernelDistance(FeaturesMetric):
    """The kernel distance; it keeps the features of both sets, 4 (N + M) d bytes, for its subsets are drawn of all."""

    @staticmethod
    def compare(real: FeatureSet, generated: FeatureSet) -> float:
        return kernel_distance(real.values, generated.values)
