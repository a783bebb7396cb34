"""Writes EDM's zips: uncompressed, file by file, so that a killed process can be resumed."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

_LOCAL = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLORS = {"L": 0, "RGB": 2}
_INDEX = re.compile(r"\d{5}/\D*(\d{8,})\.\w+")


def image_name(index: int) -> str:
    """Returns the name of a file of a data set, by its position in the source: 00012/img00012345.png."""
    digits = f"{index:08d}"
    return f"{digits[:5]}/img{digits}.png"


def image_index(name: str) -> int:
    """Returns the position in the source of a file that `image_name` named.  Raises: ValueError: it did not."""
    match = _INDEX.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return int(match[1])


def encode_png(image: Image.Image) -> bytes:
    """Returns an 8-bit picture, grayscale or RGB, as an uncompressed PNG.

    Rows are not filtered, which without compression saves nothing: Pillow would try five filters on each.
    """
    rows = np.asarray(image).reshape(image.height, -1)
    unfiltered = np.zeros((image.height, 1 + rows.shape[1]), np.uint8)
    unfiltered[:, 1:] = rows
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _COLORS[image.mode], 0, 0, 0)
    return b"".join(
        [
            _SIGNATURE,
            *_chunk(b"IHDR", header),
            *_chunk(b"IDAT", zlib.compress(unfiltered.data, 0)),
            *_chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, data: bytes) -> tuple[bytes, ...]:
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


class EdmZip:
    """An uncompressed zip that is being written; it has no directory before it is finished.

    Args:
        path: of the file; created if it is not there.
        size: bytes that are kept of it, whole files: what `size` was.
    Raises: OSError.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self.names: list[str] = []
        self.file.truncate(size)
        self._archive = zipfile.ZipFile(self.file, "w")
        while self.file.tell() < size:
            self._recover()
        self._archive.start_dir = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.fp = None  # or it would write a directory when it is collected
        self.file.close()

    def _recover(self) -> None:
        """Enters the file whose header comes next in the directory."""
        offset = self.file.tell()
        fields = _LOCAL.unpack(self.file.read(_LOCAL.size))
        crc, length = fields[6], fields[8]
        name = self.file.read(fields[9]).decode()
        self._enter(name, length, crc, offset)
        self.file.seek(length, os.SEEK_CUR)

    def _enter(self, name: str, length: int, crc: int, offset: int) -> zipfile.ZipInfo:
        entry = zipfile.ZipInfo(name)
        entry.file_size = entry.compress_size = length
        entry.CRC, entry.header_offset, entry.external_attr = crc, offset, 0o644 << 16
        self._archive.filelist.append(entry)
        self._archive.NameToInfo[name] = entry
        self.names.append(name)
        return entry

    def add(self, name: str, data: bytes) -> None:
        """Appends a file."""
        offset = self._archive.start_dir
        entry = self._enter(name, len(data), zlib.crc32(data), offset)
        header = entry.FileHeader(zip64=False)
        self.file.write(header)
        self.file.write(data)
        self._archive.start_dir = offset + len(header) + len(data)

    @property
    def size(self) -> int:
        """Bytes of the files that were added."""
        return self._archive.start_dir

    def sync(self) -> None:
        """Waits until all is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Writes the directory: the file is a zip from now on."""
        self._archive.close()
        self.sync()
