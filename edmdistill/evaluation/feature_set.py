"""Features of a set of images, kept as they are, and the distances to their nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.evaluation.base import ComparingMetric
from edmdistill.progress import progress_bar

TILE = 2048
"""Rows and columns of the distances that are in memory at a time, in float64: 34 MB."""
TIE = 1e-13
"""Squared distances that differ by less, relative to the largest squared norm, are equal: rounding decides no tie."""


class FeatureSet:
    """Features of a set of images, in memory: 4 N d bytes, 410 MB for 50,000 of Inception's.

    Args:
        values: float32 [N,d]
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._radii: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def largest_square(self) -> float:
        """The largest squared norm of a feature."""
        return max(float(self.values[rows].double().square().sum(1).amax()) for rows in _tiles(len(self)))

    def squared_radii(self, k: int) -> Tensor:
        """Returns the squared distance of each feature to its k-th nearest other one, computed once.  float64 [N]

        Raises: EdmDistillError: there are no k others.
        """
        if len(self) <= k:
            raise EdmDistillError(
                f"the {k} nearest neighbors of an image need more than {k} images, but there are {len(self)}: give more"
            )
        if k not in self._radii:
            self._radii[k] = _squared_radii(self.values, k)
        return self._radii[k]


class Features:
    """Collects a FeatureSet."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Adds features, which are kept.  [B,d]"""
        self._batches.append(features.to("cpu", torch.float32))

    def finish(self) -> FeatureSet:
        """Returns all features so far, in their order.  Raises: NotFiniteError: some are NaN or infinite."""
        values = torch.cat(self._batches)
        if not values.isfinite().all():
            raise NotFiniteError("features of images are NaN or infinite: the network or the feature space overflows")
        return FeatureSet(values)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns |x_i - y_j|^2.  [N,d], [M,d] -> [N,M], the dtype of x and y"""
    products = x @ y.T
    return products.mul_(-2).add_(x.square().sum(1)[:, None]).add_(y.square().sum(1)).clamp_(min=0)


def _tiles(count: int) -> list[slice]:
    """Returns the slices of at most TILE rows that cover `count` rows."""
    return [slice(at, min(at + TILE, count)) for at in range(0, count, TILE)]


def _shown(pairs: list[tuple[slice, slice]]) -> Iterator[tuple[slice, slice]]:
    """Yields the pairs of tiles, with a progress bar."""
    yield from progress_bar(len(pairs), "distances", "tile", iterable=pairs)


def _squared_radii(values: Tensor, k: int) -> Tensor:
    """Returns the squared distance of each row to its k-th nearest other row.  [N,d] -> float64 [N]

    The distances of two tiles serve the neighbors of both.
    """
    nearest = torch.full((len(values), k), torch.inf, dtype=torch.float64)

    def add(rows: slice, distances: Tensor) -> None:
        closest = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], closest], 1).topk(k, largest=False).values

    for rows, others in _shown(list(combinations_with_replacement(_tiles(len(values)), 2))):
        distances = squared_distances(values[rows].double(), values[others].double())
        if rows == others:
            distances.fill_diagonal_(torch.inf)
        else:
            add(others, distances.T.contiguous())
        add(rows, distances)
    return nearest.amax(1)


def count_inside(centers: FeatureSet, k: int, points: FeatureSet, *, border: bool) -> tuple[Tensor, Tensor]:
    """Counts which points are in which balls: those around the centers that reach to their k-th nearest other center.

    Args:
        border: whether a point on the border of a ball is in it.
    Returns: the number of balls that each point is in, int64 [M]; the number of points in each ball, int64 [N].
    """
    tie = TIE * max(centers.largest_square, points.largest_square)
    bounds = centers.squared_radii(k)[:, None] + (tie if border else -tie)
    balls, members = torch.zeros(len(points), dtype=torch.int64), torch.zeros(len(centers), dtype=torch.int64)
    for rows, columns in _shown(list(product(_tiles(len(centers)), _tiles(len(points))))):
        distances = squared_distances(centers.values[rows].double(), points.values[columns].double())
        reached = distances <= bounds[rows] if border else distances < bounds[rows]
        balls[columns] += reached.sum(0)
        members[rows] += reached.sum(1)
    return balls, members


class FeaturesMetric(ComparingMetric):
    """The base of metrics that compare the features of both sets, all of which it keeps."""

    reference = Features
