"""The Frechet distance between Gaussians fitted to two sets of features, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edmdistill.errors import DatasetError
from edmdistill.evaluation.base import ComparingMetric

BLOCK = 4096
"""Rows whose products are added at a time."""


class GaussianStatistics(NamedTuple):
    """Mean [d] and unbiased (n - 1) covariance [d,d] of n features, float64; n is None where it is not known."""

    mean: Tensor
    covariance: Tensor
    n: int | None


class RunningStatistics:
    """Accumulates mean and covariance over batches of features, on the device of the features.

    Features are added BLOCK rows at a time, however they come in. Sums are taken about the mean of the first block, so
    that features far from the origin lose no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._waiting: list[Tensor] = []
        self._shift: Tensor | None = None
        self._sum = self._outer = torch.zeros((), dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features.  [N,d]"""
        self.n += len(features)
        self._waiting.append(features)
        if sum(map(len, self._waiting)) < BLOCK:
            return
        rows = torch.cat(self._waiting)
        while len(rows) >= BLOCK:
            block, rows = rows[:BLOCK].double(), rows[BLOCK:]
            if self._shift is None:
                self._shift = block.mean(0)
            self._sum, self._outer = self._with(block - self._shift)
        self._waiting = [rows]

    def finish(self) -> GaussianStatistics:
        """Returns the statistics of all features so far.  Raises DatasetError for fewer than two."""
        if self.n < 2:
            raise DatasetError(f"a covariance needs at least two images, but there is only {self.n}: give more")
        rest = torch.cat(self._waiting).double()
        shift = rest.mean(0) if self._shift is None else self._shift
        total, outer = self._with(rest - shift)
        mean = total / self.n
        covariance = (outer - self.n * mean.outer(mean)) / (self.n - 1)
        return GaussianStatistics((mean + shift).cpu(), covariance.cpu(), self.n)

    def _with(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums of x and of x x^T with those of more rows."""
        return self._sum + centered.sum(0), self._outer + gram(centered)


def gram(x: Tensor) -> Tensor:
    """Returns x^T x.  On a CPU by NumPy, which knows that half of it is the other half."""
    return torch.from_numpy(x.numpy().T @ x.numpy()) if x.device.type == "cpu" else x.T @ x


def statistics(features: Tensor) -> GaussianStatistics:
    """Returns the mean and unbiased covariance of features [N,d], N >= 2."""
    running = RunningStatistics()
    running.update(features)
    return running.finish()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Returns the squared Frechet (Wasserstein-2) distance between two Gaussians.

    |m_a - m_b|^2 + tr(A + B - 2 sqrt(AB)),  tr sqrt(AB) = sum of the singular values of M = L^T K, A = L L^T, B = K K^T

    Returns: a float >= 0, up to rounding; NaN where a feature was NaN or infinite.
    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), section 3.
    Differs: singular values replace the square root of the nonsymmetric AB, so the result is never complex, and exact
        for covariances without full rank. They are the roots of the eigenvalues of M M^T, for which LAPACK takes a
        third of the time.
    """
    from scipy import linalg  # slow to import, and training, which imports this file, seldom needs it

    A, B = a.covariance.numpy(), b.covariance.numpy()
    apart = float((a.mean - b.mean).square().sum() + A.trace() + B.trace())
    if not math.isfinite(apart):
        return math.nan
    M = factor(A).T @ factor(B)
    gram = M @ M.T if len(M) <= len(M.T) else M.T @ M
    cross = np.sqrt(linalg.eigvalsh(gram).clip(0)).sum() if gram.size else 0.0
    return apart - 2 * float(cross)


def factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns L [d,r] with covariance = L L^T, where r is the rank: Cholesky's factorization with pivots.

    It fails where rounding has left noise in place of zeros, as in covariances of float32; there L is made of
    eigenvectors, in ten times the time. What is negative is dropped.
    """
    from scipy import linalg

    packed, pivots, rank, _ = linalg.lapack.dpstrf(covariance, lower=1)
    lower = np.zeros((len(covariance), rank))
    lower[pivots - 1] = np.tril(packed)[:, :rank]
    rounding = len(covariance) * np.finfo(np.float64).eps * np.abs(covariance).max()
    if np.abs(covariance - lower @ lower.T).max() > 2 * rounding:
        values, vectors = linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(values.clip(0)))
    return lower


class FrechetDistance(ComparingMetric):
    """The Frechet distance of Gaussians fitted to the features of both sets, as a metric."""

    reference = RunningStatistics

    @staticmethod
    def compare(real: GaussianStatistics, generated: GaussianStatistics) -> float:
        return frechet_distance(generated, real)
