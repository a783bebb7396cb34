"""Threads in the roles of processes: they share a folder and wait for one another, as gloo's do."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Rank:
    """A process of several; see evaluation.shards.Processes."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, values: list[Tensor]) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._values = barrier, values

    def any_process(self, flag: bool) -> bool:
        return bool(self.all_reduce(torch.tensor(float(flag))))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._values[self.rank] = tensor
        self._barrier.wait()
        total = torch.stack(self._values).sum(0, dtype=tensor.dtype)
        self._barrier.wait()
        return total


def in_ranks(world_size: int, act: Callable[[Rank], T]) -> list[T]:
    """Returns what `act` returns in each of several processes.

    Raises: what it raises in one of them; the others wait no longer.
    """
    barrier, values = threading.Barrier(world_size), [torch.zeros([])] * world_size

    def run(rank: int) -> T:
        try:
            return act(Rank(rank, world_size, barrier, values))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause, not that others waited for it in vain
    return [future.result() for future in futures]
