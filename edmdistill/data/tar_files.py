"""The files of a tar, read in place and never unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from edmdistill.data.files import Member, as_dataset_error, too_large
from edmdistill.errors import DatasetError, printable

OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""By the first bytes of a compressed file."""
MAX_RATIO = 200
"""How many bytes a compressed byte may become: pictures hardly shrink, bombs do so a thousandfold."""
_BLOCK = 2**20
_TYPES = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class TarFiles:
    """The regular files of an uncompressed tar; a tar inside it is the folder of its name.

    Args:
        path: for errors.
        content: where its bytes are, if not at `path`.
        on_bytes: called with the number of bytes that the search for files has just passed.
    Attributes:
        left_out: the reason for each link, pipe or device, by name.
    """

    def __init__(
        self, path: Path, content: Path | None = None, on_bytes: Callable[[int], object] = lambda count: None
    ) -> None:
        self.path, self.content, self._on_bytes = path, content or path, on_bytes
        self.left_out: dict[str, str] = {}

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each file begins, and its size in bytes, by name.  Raises: DatasetError: the tar is damaged."""
        places: dict[str, tuple[int, int]] = {}
        with (
            as_dataset_error(lambda why: f"{self.path} is not a whole tar ({why}): copy or download it again"),
            self.content.open("rb") as file,
        ):
            passed = 0
            for name, place, size in self._walk(file, "", 0, os.fstat(file.fileno()).st_size):
                self._on_bytes(place + size - passed)
                passed = place + size
                if name in places:
                    raise DatasetError(
                        f"{self.path} holds {printable(name)} twice; make the archive again, or unpack it"
                    )
                places[name] = place, size
        return places

    def _walk(self, file: IO[bytes], folder: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Yields each regular file of the tar between two places: name, place and size."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would hold every header in memory
                name = folder + entry.name.removeprefix("./").lstrip("/")
                if entry.type in _TYPES or entry.issparse():  # the latter also of a regular type
                    self.left_out[name] = _TYPES.get(entry.type, "a sparse file")
                elif entry.isreg():
                    if entry.offset_data + entry.size > end:
                        raise EOFError(f"{name} lies beyond its end")
                    if not folder and name.lower().endswith(".tar"):
                        yield from self._walk(file, f"{name[:-4]}/", entry.offset_data, entry.offset_data + entry.size)
                    else:
                        yield name, entry.offset_data, entry.size
            # tarfile takes a broken header for the end.
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)) or tar.offset >= end:
                raise EOFError(f"{folder or 'it'} has no end mark at byte {tar.offset - start:,}")

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.content, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def members(self) -> list[Member]:
        return [Member(name, size, None, too_large(size)) for name, (_, size) in self._places.items()]

    def read(self, name: str) -> bytes:
        place, size = self._places[name]
        data = os.pread(self._descriptor, size, place)
        if len(data) < size:
            raise EOFError(f"it ends after {len(data):,} of {size:,} bytes")
        return data


def is_tar(path: Path) -> bool:
    """Returns whether the file is a tar, compressed or not."""
    with path.open("rb") as file:
        head = file.read(512)
        opener = _opener(head)
        if opener is None:
            return head[257:262] == b"ustar"
        file.seek(0)
        with suppress(DatasetError), as_dataset_error(str), opener(file) as content:
            return bool(content.read(512)[257:262] == b"ustar")
    return False


def is_compressed(path: Path) -> bool:
    """Returns whether the file is one that `decompress` reads."""
    with path.open("rb") as file:
        return _opener(file.read(8)) is not None


def decompress(path: Path, target: Path, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Writes what a gzip, bzip2 or xz file holds to another file, which is there only when it is whole.

    Args:
        on_bytes: called with the number of bytes that have just been read of the compressed file.
    Raises: DatasetError: it is damaged, or grows more than MAX_RATIO-fold.  OSError: the disk is full.
    """
    new, limit = target.with_name(f"{target.name}.new"), MAX_RATIO * path.stat().st_size
    with path.open("rb") as file, new.open("wb") as out:
        opener = _opener(file.read(8))
        assert opener is not None, path
        file.seek(0)
        with opener(file) as content:
            read = written = 0
            while True:
                with as_dataset_error(lambda why: f"{path} is damaged ({why}): copy or download it again"):
                    block = content.read(_BLOCK)
                if not block:
                    break
                written += len(block)
                if written > limit:
                    raise DatasetError(f"{path} unfolds to more than {MAX_RATIO} times its size; unpack it yourself")
                out.write(block)
                on_bytes(file.tell() - read)
                read = file.tell()
    new.replace(target)


def _opener(head: bytes) -> Callable[[IO[bytes]], Any] | None:
    return next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
