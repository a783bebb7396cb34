"""The Frechet distance between Gaussians fitted to two sets of features, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GaussianStatistics(NamedTuple):
    """Mean [d] and unbiased (n - 1) covariance [d,d] of n features, float64."""

    mean: Tensor
    covariance: Tensor
    n: int


class RunningStatistics:
    """Accumulates mean and covariance over batches of features, on the device of the features.

    Sums are taken about the mean of the first batch, so that features far from the origin lose no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._shift = self._sum = self._outer = torch.zeros(0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features.  [N,d]"""
        features = features.to(torch.float64)
        if self.n == 0:
            self._shift = features.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._outer = torch.zeros_like(self._shift).outer(self._shift)
        centred = features - self._shift
        self.n += len(features)
        self._sum = self._sum + centred.sum(0)
        self._outer = self._outer + centred.T @ centred

    def finish(self) -> GaussianStatistics:
        """The statistics of all features so far.  Raises ValueError for fewer than two."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.n}")
        mean = self._sum / self.n
        covariance = (self._outer - self.n * mean.outer(mean)) / (self.n - 1)
        return GaussianStatistics((mean + self._shift).cpu(), covariance.cpu(), self.n)


def statistics(features: Tensor) -> GaussianStatistics:
    """Mean and unbiased covariance of features [N,d], N >= 2."""
    running = RunningStatistics()
    running.update(features)
    return running.finish()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The squared Frechet (Wasserstein-2) distance of two Gaussians.

    |m_a - m_b|^2 + tr(A + B - 2 sqrt(AB)),  tr sqrt(AB) = sum sqrt(eigvalsh(A^1/2 B A^1/2))

    Returns: a float >= 0, up to rounding.
    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), section 3.
    Differs: symmetric eigenvalues replace the square root of the nonsymmetric AB, so that it is never complex, and
        exact where a covariance has not full rank.
    """
    root = _matrix_sqrt(a.covariance)
    cross = _eigenvalues(root @ b.covariance @ root)[0].sqrt().sum()
    mean = (a.mean - b.mean).square().sum()
    return float(mean + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def _matrix_sqrt(covariance: Tensor) -> Tensor:
    values, vectors = _eigenvalues(covariance)
    return (vectors * values.sqrt()) @ vectors.T


def _eigenvalues(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    # Eigenvalues below the rounding of the largest are zeros of a matrix without full rank; their roots would count.
    floor = len(values) * torch.finfo(values.dtype).eps * values.max().clamp(min=0)
    return torch.where(values > floor, values, 0), vectors
