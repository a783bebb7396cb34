"""The training data of a run: batches at positions in an endless stream of shuffled epochs.

The sample at a position depends on (seed, position) alone. So a request is only a pair of positions, any process can
answer it, and batches are bit-identical with any number of workers: their numbers are copied, or result from single
additions and products, which every processor rounds alike.

The workers are a standard pool's, and not a torch DataLoader's: an error in one is raised as itself, instead of as a
traceback inside another error, and its death is noticed at once, whoever started it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType

import torch

from edmdistill.checkpoints.encoder import LatentEncoder
from edmdistill.data.datasets import Dataset
from edmdistill.data.latents import draw_latents, latent_noise
from edmdistill.data.order import indices
from edmdistill.errors import TrainingError
from edmdistill.machine.launch import imports_from_working_directory
from edmdistill.machine.signals import REQUESTS
from edmdistill.methods.base import Batch
from edmdistill.threads import in_order
from edmdistill.transfer import to_device

AHEAD = 2
"""Requests in flight for each worker, besides the batch in use."""


@dataclass(frozen=True)
class Reader:
    """Answers requests, in any process; the arguments are those of Stream."""

    dataset: Dataset
    seed: int
    labels: bool
    scaling: LatentEncoder | None

    def __call__(self, start: int, stop: int) -> Batch:
        """Returns the samples at the positions [start, stop), in the host's memory."""
        x0, labels = self.dataset.tensors(indices(self.seed, start, stop - start, len(self.dataset)))
        if self.scaling is not None:
            size = self.dataset.img_resolution
            eps = latent_noise(self.seed, start, stop, self.dataset.img_channels, size, size)
            x0 = draw_latents(x0, eps, self.scaling)
        return Batch(x0, labels if self.labels else None)


class Stream:
    """Reads a data set in the order that the seed determines, from any position. Workers live within its `with`.

    Args:
        labels: whether batches have labels.
        scaling: of the network's VAE, for a data set of latents.
        workers: processes that read ahead; 0: none. A script that asks for some must guard its main part by
            `if __name__ == "__main__"`, as always with multiprocessing.
        device: of the batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        labels: bool,
        scaling: LatentEncoder | None = None,
        workers: int,
        device: torch.device,
    ) -> None:
        self.reader = Reader(dataset, seed, labels, scaling)
        self.workers = workers
        self.device = device
        self._pool: ProcessPoolExecutor | None = None
        self._open = ExitStack()

    def __enter__(self) -> Stream:
        if self.workers:
            with _explained():
                self._pool = self._open.enter_context(_workers(self.workers, self.reader))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, start: int, stop: int) -> Batch:
        """Returns the samples at the positions [start, stop).

        Raises: DatasetError: one of them cannot be read.
        """
        return self._place(self.reader(start, stop))

    def batches(self, requests: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Yields the samples of every request, in order. Requests are consumed as workers become free.

        Raises: DatasetError: a sample cannot be read.  TrainingError: a worker has ended.
        """
        pool = self._pool
        if pool is None:
            for start, stop in requests:
                yield self.read(start, stop)
            return

        def submit(request: tuple[int, int]) -> Future[Batch]:
            with _explained():  # it starts a worker, until there are enough
                return pool.submit(_answer, request)

        answers = in_order(submit, requests, AHEAD * self.workers)
        try:
            yield from map(self._place, answers)
        except BrokenProcessPool as error:
            raise TrainingError(
                "a data worker died, probably because memory or /dev/shm is full: use fewer --workers, or "
                "--workers 0 with the same command, which resumes from the last state"
            ) from error

    def _place(self, batch: Batch) -> Batch:
        labels = None if batch.labels is None else to_device(batch.labels, self.device)
        return Batch(to_device(batch.x0, self.device), labels)


@contextmanager
def _explained() -> Iterator[None]:
    """Raises TrainingError where the system does not let a worker start; the server of forks may have said why."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise TrainingError(
            f"a data worker cannot be started ({error}): use fewer --workers, or --workers 0; or raise the limits of "
            "processes and open files (ulimit -u, ulimit -n), and see that /dev/shm can be written"
        ) from error


@contextmanager
def _workers(count: int, reader: Reader) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of processes that hold the reader, and end at once when the pool is closed or this process dies."""
    # A fork of this process would copy locks that its other threads (CUDA's, the process group's) hold at that moment,
    # and hang. A fork of a server that only imports this module has none of them, and needs no import.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C reaches the whole group. Signals that are blocked here are blocked in the server, and so in its forks, from
    # their first moment: this process alone decides what an interrupted run still does.
    with _safe_path():
        resource_tracker.ensure_running()  # the server needs it, and starting it unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, _begin, (reader, theirs))
    try:
        yield pool
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        theirs.close()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Lets processes that the block starts import nothing from the working directory, unless this one does."""
    name = "PYTHONSAFEPATH"
    if name in os.environ or imports_from_working_directory():
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


# In a worker.

_reader: Reader


def _begin(reader: Reader, lifeline: Connection) -> None:
    global _reader
    _reader = reader
    torch.set_num_threads(1)
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    """Ends this process when nobody holds the other end of the pipe any more; nothing is ever sent."""
    lifeline.poll(None)
    os._exit(0)


def _answer(request: tuple[int, int]) -> Batch:
    return _reader(*request)
