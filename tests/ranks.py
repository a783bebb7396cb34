"""Threads in the roles of processes: they share a folder and wait for one another, as gloo's do."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Rank:
    """A process of several; see evaluation.shards.Processes."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, flags: list[bool]) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._flags = barrier, flags

    def any_process(self, flag: bool) -> bool:
        self._flags[self.rank] = flag
        self._barrier.wait(60)
        found = any(self._flags)
        self._barrier.wait(60)
        return found


def in_ranks(world_size: int, act: Callable[[Rank], T]) -> list[T]:
    """Returns what `act` returns in each of several processes."""
    barrier, flags = threading.Barrier(world_size), [False] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: act(Rank(rank, world_size, barrier, flags)), range(world_size)))
