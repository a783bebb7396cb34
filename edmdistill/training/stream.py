"""The training data of a run: batches at positions in an endless stream of shuffled epochs.

What is at a position hangs on (seed, position) alone. So a request is only a pair of positions, any process can answer
it, and with any number of workers the batches are the same, to the bit: their numbers are moved, or come of single
additions and products, which every processor rounds alike.

The workers are a standard pool's, and not a torch DataLoader's: an error in one comes out as itself, instead of as a
traceback in the words of another, and its death is seen at once, whoever started it.
"""

from __future__ import annotations

import os
import signal
from collections import deque
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
from torch import Tensor

from edmdistill.data.datasets import Dataset, indices
from edmdistill.data.latents import LatentScaling, draw_latents, latent_noise
from edmdistill.errors import TrainingError
from edmdistill.methods.base import Batch

AHEAD = 2
"""Requests on their way for each worker, beside the batch in use."""


@dataclass(frozen=True)
class Reader:
    """Answers requests, in whichever process it is; the arguments are Stream's."""

    dataset: Dataset
    seed: int
    labels: bool
    statistics: LatentScaling | None

    def __call__(self, start: int, stop: int) -> Batch:
        """The samples at the positions [start, stop), in the host's memory."""
        x0, labels = self.dataset.tensors(indices(self.seed, start, stop - start, len(self.dataset)))
        if self.statistics is not None:
            size = self.dataset.img_resolution
            eps = latent_noise(self.seed, start, stop, self.dataset.img_channels, size, size)
            x0 = draw_latents(x0, eps, self.statistics)
        return Batch(x0, labels if self.labels else None)


class Stream:
    """Reads a data set in the order that the seed decides, from any position. Workers live within its `with`.

    Args:
        labels: whether classes come along.
        statistics: of the network's VAE, for a data set of latents.
        workers: processes that read ahead; 0: none. A script that asks for some guards its main part by
            `if __name__ == "__main__"`, as always with multiprocessing.
        device: where batches are wanted.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        labels: bool,
        statistics: LatentScaling | None = None,
        workers: int,
        device: torch.device,
    ) -> None:
        self.reader = Reader(dataset, seed, labels, statistics)
        self.workers = workers
        self.device = device
        self._pool: ProcessPoolExecutor | None = None
        self._open = ExitStack()

    def __enter__(self) -> Stream:
        if self.workers:
            self._pool = self._open.enter_context(_workers(self.workers, self.reader))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, start: int, stop: int) -> Batch:
        """The samples at the positions [start, stop).

        Raises: DatasetError: one of them cannot be read.
        """
        return self._place(self.reader(start, stop))

    def follow(self, requests: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """The samples of every request, in order. Requests are taken as there are workers to answer them.

        Raises: DatasetError: a sample cannot be read.  TrainingError: a worker has ended.
        """
        if self._pool is None:
            for start, stop in requests:
                yield self.read(start, stop)
            return
        answers: deque[Future[Batch]] = deque()
        try:
            for start, stop in requests:
                answers.append(self._pool.submit(_answer, start, stop))
                if len(answers) > AHEAD * self.workers:
                    yield self._place(answers.popleft().result())
            while answers:
                yield self._place(answers.popleft().result())
        except BrokenProcessPool as error:
            raise TrainingError(
                "a data worker ended, as it does when memory or /dev/shm is full: give fewer --workers, or "
                "--workers 0, and the same command goes on from the last state"
            ) from error

    def _place(self, batch: Batch) -> Batch:
        def place(tensor: Tensor) -> Tensor:
            # From pinned memory the copy runs beside this process, which goes on to queue the computation.
            pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
            return pinned.to(self.device, non_blocking=True)

        return Batch(place(batch.x0), None if batch.labels is None else place(batch.labels))


@contextmanager
def _workers(count: int, reader: Reader) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that know the reader, and that end at once when it is left or this process dies."""
    # A fork of this process would copy locks that its other threads (CUDA's, the process group's) hold at that moment,
    # and hang on them. A fork of a server that only imports this module has nothing of theirs, and costs no import.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C reaches the whole group. Signals that are blocked here are blocked in the server, and so in its forks, from
    # their first moment: this process alone decides what an interrupted run still does.
    resource_tracker.ensure_running()  # the server wants it, and starting it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
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


def _answer(start: int, stop: int) -> Batch:
    return _reader(start, stop)
