"""Features of images, computed once: shared by processes, and kept in files from which a stopped evaluation resumes.

A batch is measured whole, by one process. Metrics get the batches in order, whoever measured them and whenever, so that
their values depend on neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edmdistill.atomic import atomic_write, lock
from edmdistill.checkpoints.download import cache_folder
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import Damaged, EdmDistillError, NotFiniteError

SHARD_IMAGES, SHARD_SECONDS = 4096, 30.0
"""A file is written after so many images or seconds: no more is lost when a process is killed."""
SHARD = re.compile(r"(\d{9})-(\d{9})\.safetensors")
LOCK, REQUEST, RESULT = "lock", "request.json", "result.json"

MeasuredBatch = tuple[range, dict[str, Tensor]]
"""Consecutive images, and arrays with a row for each."""


class Processes(Protocol):
    """The processes that share an evaluation, seen from one of them; see machine.engine.Engine."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def any_process(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process, after all have called it."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes, after all have called it."""
        ...


class OneProcess:
    """An evaluation by this process alone."""

    rank, world_size = 0, 1

    def any_process(self, flag: bool) -> bool:
        return flag

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


ONE_PROCESS = OneProcess()


def evaluations_folder() -> Path:
    """Returns where evaluations are kept by default, in the user's cache."""
    return cache_folder() / "evaluations"


class Work:
    """The folders in which evaluations are kept until their results are written.

    Args:
        root: holds a folder for each evaluation; processes on several machines must share it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, Path] = {}
        self._locks: dict[Path, int] = {}

    def folder(self, identity: Mapping[str, Any], processes: Processes, *, several: bool = False) -> Path:
        """Returns the folder of an evaluation, which this command has to itself until `remove`.

        Args:
            identity: all that decides what is measured, as JSON.
            several: commands may measure this at once, each in a folder of its own, as evaluations do with a reference.
        Raises: EdmDistillError: another command makes this evaluation now.  CheckpointError: the disk refuses.
        """
        document = json.dumps(identity, indent=2, sort_keys=True)
        name = hashlib.sha256(document.encode()).hexdigest()[:32]
        if name not in self._folders:
            # The others go on when the folder is there.
            number = torch.tensor(self._open(name, document, several) if processes.rank == 0 else 0)
            self._folders[name] = self._numbered(name, int(processes.all_reduce(number)))
        return self._folders[name]

    def _numbered(self, name: str, number: int) -> Path:
        return self.root / (f"{name}-{number}" if number else name)

    def _open(self, name: str, document: str, several: bool) -> int:
        """Makes and locks the folder of an evaluation, and returns its number."""
        number = 0
        while True:
            folder = self._numbered(name, number)
            if not (folder / REQUEST).exists():
                with atomic_write(folder / REQUEST) as new:
                    new.write_text(document + "\n", encoding="utf-8")
            try:
                self._locks[folder] = _lock(folder)
                return number
            except EdmDistillError:
                if not several:
                    raise
            number += 1

    def abandoned(self) -> list[Path]:
        """Returns the folders of evaluations that no command makes now; the same command would go on with its own."""
        folders = sorted(file.parent for file in self.root.glob(f"*/{REQUEST}"))
        return [folder for folder in folders if not _in_use(folder)]

    def remove(self) -> None:
        """Removes the folders that were asked for: their results are written."""
        for folder in self._locks:
            shutil.rmtree(folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leaves the folders to other commands."""
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()
        self._folders.clear()


def remove_shards(folder: Path) -> None:
    """Removes what is measured from the folder of an evaluation."""
    for inner in folder.iterdir():
        if inner.is_dir():
            shutil.rmtree(inner, ignore_errors=True)


def batches(rows: range, batch: int) -> Iterator[range]:
    """Yields consecutive rows in pieces that end at the multiples of `batch`."""
    cuts = sorted({rows.start, *range(rows.start - rows.start % batch + batch, rows.stop, batch), rows.stop})
    return (range(first, last) for first, last in pairwise(cuts))


def measure_all(
    count: int,
    batch: int,
    measure: Callable[[Iterable[range]], Iterable[MeasuredBatch]],
    *,
    folder: Path | None = None,
    processes: Processes = ONE_PROCESS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Iterator[MeasuredBatch]:
    """Yields what is measured of all images, batch by batch, in order; on the first process alone.

    Args:
        count: the number of images.
        batch: images at a time; the same in all processes.
        measure: measures the images of batches, in their order.
        folder: of Work, where it is kept, and taken from if it is there; None: nowhere.
        on_progress: called with the number of images that have just been measured, or were there already.
    Raises: CheckpointError: the disk refuses.  EdmDistillError: what others have measured is not to be seen here.
    """
    if folder is None:
        yield from _in_turns(list(batches(range(count), batch)), measure, processes, on_progress)
        return
    folder.mkdir(parents=True, exist_ok=True)
    stored = _stored(folder)
    processes.any_process(False)  # nobody writes before all have seen the same files
    missing = [piece for rows in _gaps(stored, count) for piece in batches(rows, batch)]
    rank, world_size = processes.rank, processes.world_size
    share = missing[len(missing) * rank // world_size : len(missing) * (rank + 1) // world_size]
    on_progress(count - sum(map(len, missing)))
    try:
        _keep(measure(share), folder, on_progress)
    except EdmDistillError as error:
        error.add_note(f"in process {rank}, and not in the others")
        raise
    processes.any_process(False)
    if rank == 0:
        on_progress(sum(map(len, missing)) - sum(map(len, share)))
        yield from _read(folder, count, batch)


def _in_turns(
    pieces: Sequence[range],
    measure: Callable[[Iterable[range]], Iterable[MeasuredBatch]],
    processes: Processes,
    on_progress: Callable[[int], object],
) -> Iterator[MeasuredBatch]:
    """Yields what all processes measure, a batch of each in every turn; on the first process alone.

    Every process takes part in every turn, which networks need whose weights are sharded over them.

    Raises: NotFiniteError: on all processes, if one raises it.
    """
    rank, world_size = processes.rank, processes.world_size
    turns = -(-len(pieces) // world_size)
    share = [pieces[min(turn * world_size + rank, len(pieces) - 1)] for turn in range(turns)]
    measured = iter(measure(share))
    for turn in range(turns):
        arrays: dict[str, Tensor] = {}
        failure = None
        try:
            _, arrays = next(measured)
        except NotFiniteError as error:
            failure = error
        if processes.any_process(failure is not None):
            raise failure or NotFiniteError("samples of another process are not finite")
        of_turn = pieces[turn * world_size : (turn + 1) * world_size]
        on_progress(sum(map(len, of_turn)))
        gathered = {name: _gather(array, len(of_turn[0]), processes) for name, array in arrays.items()}
        if rank == 0:
            for other, rows in enumerate(of_turn):
                yield rows, {name: every[other, : len(rows)] for name, every in gathered.items()}
    next(measured, None)  # nothing is left but Ctrl-C, if it came while the last batches were read ahead


def _gather(array: Tensor, rows: int, processes: Processes) -> Tensor:
    """Returns the arrays of all processes, on the CPU, padded by zeros to so many rows.  [B,...] -> [n,rows,...]"""
    if processes.world_size == 1:
        return array[None]
    every = array.new_zeros(processes.world_size, rows, *array.shape[1:])
    every[processes.rank, : len(array)] = array
    return processes.all_reduce(every).cpu()


def _lock(folder: Path) -> int:
    """Returns a descriptor that holds the lock of a folder."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    if lock(file) is False:
        os.close(file)
        raise EdmDistillError(f"another command makes this evaluation now, in {folder}: wait for it")
    return file


def _in_use(folder: Path) -> bool:
    """Returns whether a command has the lock of a folder."""
    try:
        os.close(_lock(folder))
    except EdmDistillError:
        return True
    return False


def _stored(folder: Path) -> list[range]:
    """Returns the rows of each file in a folder, sorted."""
    matches = (SHARD.fullmatch(file.name) for file in folder.iterdir())
    return sorted((range(int(match[1]), int(match[2])) for match in matches if match), key=lambda rows: rows.start)


def _gaps(stored: Sequence[range], count: int) -> Iterator[range]:
    """Yields the rows below `count` that are not stored."""
    at = 0
    for rows in (*stored, range(count, count)):
        if rows.start > at:
            yield range(at, rows.start)
        at = max(at, rows.stop)


def _keep(measured: Iterable[MeasuredBatch], folder: Path, on_progress: Callable[[int], object]) -> None:
    """Writes what is measured into files, the last of them also if measuring fails or is stopped."""
    pending: list[MeasuredBatch] = []
    written = time.monotonic()
    try:
        for rows, arrays in measured:
            if pending and pending[-1][0].stop != rows.start:
                _write(pending, folder)
            pending.append((rows, arrays))
            on_progress(len(rows))
            if rows.stop - pending[0][0].start >= SHARD_IMAGES or time.monotonic() - written >= SHARD_SECONDS:
                _write(pending, folder)
                written = time.monotonic()
    finally:
        _write(pending, folder)


def _write(pending: list[MeasuredBatch], folder: Path) -> None:
    """Writes consecutive batches into one file, and empties the list."""
    if not pending:
        return
    arrays = {name: torch.cat([batch[name] for _, batch in pending]) for name in pending[0][1]}
    save_tensors(folder / f"{pending[0][0].start:09d}-{pending[-1][0].stop:09d}.safetensors", arrays)
    pending.clear()


def _read(folder: Path, count: int, batch: int) -> Iterator[MeasuredBatch]:
    """Yields what is stored, in batches, in order."""
    stored = _stored(folder)
    for rows in _gaps(stored, count):
        raise EdmDistillError(
            f"images {rows.start} to {rows.stop - 1} were measured by another process but are not in {folder}: give "
            "all processes one folder on a shared disk by --work"
        )
    at = 0
    for rows in stored:
        file = folder / f"{rows.start:09d}-{rows.stop:09d}.safetensors"
        try:
            arrays = load_tensors(file)[0]
        except Damaged as error:
            raise Damaged(error.fault, "remove it, and give the same command again") from error
        for piece in batches(range(max(at, rows.start), rows.stop), batch):
            part = slice(piece.start - rows.start, piece.stop - rows.start)
            # In memory of its own: where a file has put numbers, sums may round otherwise.
            yield piece, {name: array[part].clone() for name, array in arrays.items()}
        at = max(at, rows.stop)
