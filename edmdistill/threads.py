"""Work in threads: on items, in order and ahead of their consumer (`ahead`), or one job in the background; the number
of cores for it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

_HERE = threading.local()
PATIENCE = 5.0
"""Seconds that a thread has to end, and to clean up, before it is told again."""


def usable_cores() -> int:
    """Returns the number of cores that this process may run on, as a batch system or `taskset` leaves it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(
    act: Callable[[T], U], items: Iterable[T], threads: int, *, waiting: int | None = None, share_cores: bool = False
) -> Generator[U]:
    """Yields act(item) in order; threads act on items ahead of the one that is asked for.

    Where it ends before the last item, by an error, by Ctrl-C or because no more is asked for, each of its threads ends
    after the operation that it is at, as the main thread does at Ctrl-C.

    Args:
        threads: their number. 0: the caller's thread acts, on each item when it is asked for.
        waiting: the items that are begun besides the one that is asked for; None: one for each thread.
        share_cores: for acts that compute with torch: the cores that the caller's thread uses for an operation are
            shared out among the threads.
    """
    if not threads:
        yield from map(act, items)
        return
    crew = _Crew()
    with ExitStack() as stack:
        begin = stack.enter_context(_shared_cores(threads)) if share_cores else None
        pool = ThreadPoolExecutor(threads, initializer=begin)
        try:
            most = threads if waiting is None else waiting
            yield from in_order(lambda item: pool.submit(crew.run, act, item), items, most)
        except BaseException:  # also where no more is asked for
            crew.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(submit: Callable[[T], Future[U]], items: Iterable[T], waiting: int) -> Generator[U]:
    """Yields what is submitted of each item, in order; those before an error of `items` come first.

    Args:
        waiting: the items that are submitted besides the one that is asked for.
    """
    futures: deque[Future[U]] = deque()
    failure: BaseException | None = None
    source = iter(items)
    while failure is None:
        try:
            item = next(source)
        except StopIteration:
            break
        except BaseException as error:  # what comes before it is not lost
            failure = error
        else:
            futures.append(submit(item))
        if len(futures) > waiting:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
    if failure is not None:
        raise failure


class Background:
    """Does one job at a time in a thread of its own, and raises its error at the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")
        self._job: Future[object] | None = None

    def begin(self, act: Callable[[], object]) -> None:
        """Begins a job, once the one before has ended.  Raises: what the one before raised."""
        self.finish()
        self._job = self._thread.submit(act)

    def finish(self) -> None:
        """Waits for the job.  Raises: what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits for the job, without its error, and ends the thread."""
        self._thread.shutdown()


def in_crew() -> bool:
    """Returns whether the caller is a thread that `ahead` gave its share of the cores."""
    return getattr(_HERE, "in_crew", False)


@contextmanager
def _shared_cores(threads: int) -> Iterator[Callable[[], None]]:
    """Yields what a thread does first, to compute with its share of the cores."""
    import torch  # takes seconds, and not all acts compute

    cores = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(max(1, cores // threads))
        _HERE.in_crew = True

    try:
        yield begin
    finally:
        torch.set_num_threads(cores)  # for new threads, theirs is the default


class _Crew:
    """The threads that act on an item now."""

    def __init__(self) -> None:
        self._acting: set[int] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, act: Callable[[T], U], item: T) -> U:
        """Returns act(item).  Raises: SystemExit: nobody waits for it any longer."""
        thread = threading.get_ident()
        with self._lock:
            if self._stopped:
                raise SystemExit
            self._acting.add(thread)
        try:
            return act(item)
        finally:
            with self._lock:  # an exception of `stop` comes while the thread is here, or never
                self._acting.discard(thread)

    def stop(self) -> None:
        """Raises SystemExit in all threads, before the next instruction of Python that each of them comes to.

        Returns when all have ended. Those that have not after some time get another one, because Python only reports
        an exception that falls into a finalizer, or into a callback of the garbage collector.
        """
        while self._raise_in_all():
            again = time.monotonic() + PATIENCE
            while self._acting and time.monotonic() < again:
                time.sleep(0.01)

    def _raise_in_all(self) -> bool:
        """Raises SystemExit in the threads that act.  Returns: whether there are any."""
        with self._lock:
            self._stopped = True
            for thread in self._acting:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
            return bool(self._acting)
