"""The training data of a run: batches at positions in an endless stream of shuffled epochs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from edmdistill.data.datasets import Dataset, indices
from edmdistill.methods.base import Batch


class Stream:
    """Reads a data set in the order that the seed decides, from any position.

    Args:
        labels: whether classes come along.
        device: where batches are wanted.
    """

    def __init__(self, dataset: Dataset, *, seed: int, labels: bool, workers: int, device: torch.device) -> None:
        self.dataset = dataset
        self.seed = seed
        self.labels = labels
        self.workers = workers
        self.device = device

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def read(self, start: int, stop: int) -> Batch:
        """The samples at the positions [start, stop)."""
        x0, labels = self.dataset.tensors(indices(self.seed, start, stop - start, len(self.dataset)))
        return Batch(x0.to(self.device), None if labels is None or not self.labels else labels.to(self.device))

    def follow(self, requests: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """The samples of every request, in order."""
        for start, stop in requests:
            yield self.read(start, stop)
