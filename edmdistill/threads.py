"""Work that is shared out among threads, each with its share of the CPU's cores."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

_HERE = threading.local()


def ahead(act: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U]:
    """Yields act(item) in order; threads act on items ahead of the one that is asked for.

    Where it ends before the last item, by an error, by Ctrl-C or because no more is asked for, each of its threads ends
    after the operation that it is at, as the main thread does at Ctrl-C.

    Args:
        threads: their number; the cores that the caller's thread uses for an operation are shared out among them. 0:
            the caller's thread acts, on each item when it is asked for.
    """
    if not threads:
        yield from map(act, items)
        return
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=_begin, initargs=(max(1, cores // threads),))
    crew = _Crew()
    waiting: deque[Future[U]] = deque()
    failure: BaseException | None = None
    source = iter(items)
    try:
        while failure is None:
            try:
                item = next(source)
            except StopIteration:
                break
            except BaseException as error:  # what comes before it is not lost
                failure = error
            else:
                waiting.append(pool.submit(crew.run, act, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure
    except BaseException:  # also where no more is asked for
        crew.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # for new threads, the pool's setting is the default


def in_crew() -> bool:
    """Returns whether the caller is a thread of `ahead`: then all cores are shared out already."""
    return getattr(_HERE, "in_crew", False)


def _begin(cores: int) -> None:
    torch.set_num_threads(cores)
    _HERE.in_crew = True


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
        """Raises SystemExit in all threads, before the next instruction of Python that each of them comes to."""
        with self._lock:
            self._stopped = True
            for thread in self._acting:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
