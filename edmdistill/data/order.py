"""The order in which training visits a data set: a pure function, so that a run resumes from its position alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def indices(seed: int, position: int, batch: int, length: int) -> Tensor:
    """Returns the indices at [position, position + batch) of an endless stream of shuffled epochs.

    Epoch e is a permutation that depends on (seed, e) alone, so the stream is the same in batches of any size.

    Args:
        position: the number of samples drawn before these.
        length: the size of the data set.
    Returns: int64 [batch].
    """
    first, last = position // length, (position + batch - 1) // length
    stream = np.concatenate([_permutation(seed, epoch, length) for epoch in range(first, last + 1)])
    start = position - first * length
    return torch.from_numpy(stream[start : start + batch])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    # PCG64's raw words are the same in every release of numpy, which Generator.permutation does not promise.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(length), kind="stable")
