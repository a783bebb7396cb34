"""A zip of latents that several processes write at once, each image at its own place, and that survives a kill.

All members have one size, so the place of each follows from its number. Until all are there, the file and a journal,
which has the CRC of every image that is whole, are in a hidden folder beside the zip.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edmdistill.atomic import atomic_write, lock
from edmdistill.data.contents import LABELS
from edmdistill.data.files import ZipFiles, as_dataset_error
from edmdistill.errors import DatasetError

REQUEST, LATENTS, JOURNAL, LOCK, WRITER = "encode.json", "latents.zip", "journal", "lock", "writer"
WHOLE = 1 << 32
"""Set beside the CRC of an image that is written."""
PATIENCE = 3.0
"""Seconds in which the processes of a command that was killed are gone."""
MOST = 10**8
"""Images; their names have eight digits."""
MODE = 0o644 << 16
"""Of the files when they are unpacked."""


def member_name(i: int) -> str:
    """Returns the name of image i.  Source: EDM2, dataset_tool.py."""
    return f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy"


class LatentZip:
    """The moments of N images, float32 [2C,h,w] each, in EDM2's layout.

    Args:
        out: the zip.
        request: what decides its content, as JSON: parts of another request are not mixed with it.
        count: N.
        shape: of each image's moments, (2C, h, w).
        main: whether this is the main process, of which a zip has one at a time.
        overwrite: replace another zip when this one is complete, and parts of another request now.
    Attributes:
        finished: whether the zip is there, whole.
    Raises: DatasetError: something else is at `out`, or beside it, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        count: int,
        shape: Sequence[int],
        *,
        main: bool = True,
        overwrite: bool = False,
    ) -> None:
        if count > MOST:
            raise DatasetError(f"{count:,} images are too many for one set of latents, which holds {MOST:,}: split it")
        self.out, self.count, self.shape = out, count, tuple(shape)
        self.request = json.loads(json.dumps(request))
        self.folder = out.parent / f".{out.name}.parts"
        header = io.BytesIO()
        descr = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, descr)
        self._header = header.getvalue()
        self._size = len(self._header) + 4 * int(np.prod(self.shape))
        self._stride = len(self._info(0).FileHeader(zip64=False)) + self._size
        self._writer: int | None = None
        self.finished = self.is_complete()
        if self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)  # left by a kill just after the zip was complete
            return
        if out.exists() and not overwrite:
            raise DatasetError(
                f"{out} already exists and holds something else: choose another name, or add --overwrite"
            )
        self._open(main, overwrite)

    def is_complete(self) -> bool:
        """Returns whether the zip of this request is there."""
        return self.out.exists() and read_request(self.out) == self.request

    @property
    def written(self) -> int:
        """The number of images that are whole, of all processes."""
        return int(np.count_nonzero(self._journal))

    def missing(self, rows: range) -> list[int]:
        """Returns those of these images that are not written yet."""
        return (np.flatnonzero(self._journal[rows.start : rows.stop] == 0) + rows.start).tolist()

    def put(self, rows: Sequence[int], moments: NDArray[np.float32]) -> None:
        """Writes images, and waits until they are on the disk.

        Args:
            moments: of these images.  [B,2C,h,w]
        Raises: DatasetError: the disk refuses.
        """
        crcs = []
        with self._writing():
            for i, values in zip(rows, np.ascontiguousarray(moments, "<f4"), strict=True):
                data = self._header + values.tobytes()
                crcs.append(zlib.crc32(data))
                os.pwrite(self._file, self._info(i, crcs[-1]).FileHeader(zip64=False) + data, i * self._stride)
            os.fsync(self._file)
        self._journal[list(rows)] = np.array(crcs, np.uint64) | np.uint64(WHOLE)

    def read(self, i: int) -> NDArray[np.float32]:
        """Returns the moments of an image that is written.  [2C,h,w]"""
        data = os.pread(self._file, self._size, (i + 1) * self._stride - self._size)
        return np.frombuffer(data, "<f4", offset=len(self._header)).reshape(self.shape)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock of the folder, which one process has at a time, if its disk has locks."""
        with (self.folder / LOCK).open("w") as file:
            lock(file, wait=True)
            yield

    def finish(self, document: Mapping[str, Any]) -> None:
        """Adds dataset.json and the directory, and moves the zip to its place. All images must be written.

        Raises: DatasetError: the disk refuses.
        """
        end = self.count * self._stride
        with self._writing():
            os.ftruncate(self._file, end)  # what a kill in the middle of this left
            with os.fdopen(os.dup(self._file), "r+b") as file:
                file.seek(end)
                with zipfile.ZipFile(file, "w") as archive:
                    for i, entry in enumerate(self._journal.tolist()):
                        info = self._info(i, entry & (WHOLE - 1))
                        info.header_offset = i * self._stride
                        archive.filelist.append(info)
                    labels = zipfile.ZipInfo(LABELS)
                    labels.external_attr = MODE
                    archive.writestr(labels, json.dumps(document))
                file.flush()
                os.fsync(file.fileno())
            (self.folder / LATENTS).replace(self.out)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.finished = True

    def close(self) -> None:
        """Closes the file; the parts stay."""
        os.close(self._file)
        del self._journal
        self._release()

    def _info(self, i: int, crc: int = 0) -> zipfile.ZipInfo:
        """Returns the zip's entry of an image, but for its place."""
        info = zipfile.ZipInfo(member_name(i))
        info.external_attr = MODE
        info.CRC, info.file_size, info.compress_size = crc, self._size, self._size
        return info

    def _open(self, main: bool, overwrite: bool) -> None:
        """Opens the parts, made if there are none."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.alone():
                if not (self.folder / REQUEST).exists():
                    self._require_room()
                    self._write_request()
                problem = self._problem()
                if problem is not None and not overwrite:
                    raise DatasetError(problem)
                if main or problem is not None:
                    self._claim()
                if problem is not None:
                    for part in (LATENTS, JOURNAL):
                        (self.folder / part).unlink(missing_ok=True)
                    self._write_request()
                if not main:
                    self._release()
                self._file = os.open(self.folder / LATENTS, os.O_RDWR | os.O_CREAT, 0o666)
                if os.fstat(self._file).st_size < self.count * self._stride:
                    os.ftruncate(self._file, self.count * self._stride)
                journal = self.folder / JOURNAL
                if not journal.exists():
                    with atomic_write(journal) as new, new.open("wb") as file:
                        file.write(bytes(8 * self.count))  # not a hole, so that a full disk is found here
                self._journal = np.memmap(journal, np.uint64, "r+", shape=(self.count,))

    def _problem(self) -> str | None:
        """Returns why the parts that are there cannot be continued, and what to do; None: they can."""
        record = self.folder / REQUEST
        try:
            stored = json.loads(record.read_bytes())
        except ValueError as error:
            return f"{record} is damaged ({error}): begin {self.out} anew with --overwrite, or choose another name"
        if stored == self.request:
            return None
        begun = stored if isinstance(stored, dict) else {}
        keys = [key for key in self.request if begun.get(key) != self.request[key]]
        return (
            f"{self.out} was begun with other {' and '.join(keys) or 'options'}: give the same, choose another name, "
            "or add --overwrite"
        )

    def _write_request(self) -> None:
        with atomic_write(self.folder / REQUEST) as new:
            new.write_text(json.dumps(self.request, indent=2) + "\n", encoding="utf-8")

    def _claim(self) -> None:
        """Keeps the lock of the main process until this one ends.  Raises: DatasetError: another command has it."""
        self._writer = os.open(self.folder / WRITER, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + PATIENCE
        while lock(self._writer) is False:
            if time.monotonic() > until:
                self._release()
                raise DatasetError(f"another process is writing {self.out}: wait for it, or choose another name")
            time.sleep(0.1)

    def _release(self) -> None:
        if self._writer is not None:
            os.close(self._writer)
        self._writer = None

    def _require_room(self) -> None:
        """Raises: DatasetError: the disk is too small."""
        needed, free = self.count * self._stride, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DatasetError(
                f"{self.out} will take {needed / 1e9:,.1f} GB, but its disk has {free / 1e9:,.1f} GB free: choose "
                "another disk"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"{self.out} cannot be written: {reason}") from error


def read_request(path: Path) -> object:
    """Returns the request that a zip of latents was made by; None if it is something else."""
    with suppress(DatasetError), as_dataset_error(str):
        return json.loads(ZipFiles(path).read(LABELS))["encoder"]["request"]
    return None
