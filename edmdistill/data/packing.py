"""Packs pictures: several threads decode, resize and encode them, and each comes out in its turn.

Pillow does all three without Python's lock, so threads share the work without copying a picture to another process.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, _imaging

from edmdistill.data.edm_zip import encode_png
from edmdistill.data.files import as_dataset_error
from edmdistill.data.pictures import Pictures, decode_picture
from edmdistill.data.transforms import Size, Transform, scale
from edmdistill.errors import printable
from edmdistill.threads import ahead

CHUNK = 8
"""Pictures that a thread takes at a time."""
AHEAD = 3
"""Chunks for each thread that are begun before the oldest is written."""


class Packed(NamedTuple):
    """A picture's PNG, None where the transform leaves it out; its width, height and mode; its file's CRC-32; and its
    changes."""

    png: bytes | None
    shape: tuple[int, int, str]
    crc: int
    changes: tuple[str, ...]


def read(source: Path, pictures: Pictures, i: int) -> tuple[bytes | Image.Image, int]:
    """Returns picture i as stored or decoded, and the CRC-32 of that.  Raises: DatasetError: it cannot be read."""
    name = printable(pictures.names[i])
    with as_dataset_error(lambda why: f"{source}: {name} cannot be read ({why}); replace or remove it"):
        stored = pictures.read(i)
    return stored, zlib.crc32(stored if isinstance(stored, bytes) else stored.tobytes())


@dataclass(frozen=True)
class PackJob:
    """The pictures, and what is made of them."""

    source: Path
    pictures: Pictures
    transform: Transform
    size: Size | None
    total: int

    def pack(self, start: int) -> list[Packed]:
        """Returns a chunk of pictures, packed."""
        return [self._pack(i) for i in range(start, min(start + CHUNK, self.total))]

    def _pack(self, i: int) -> Packed:
        where = f"{self.source}: {printable(self.pictures.names[i])}"
        stored, crc = read(self.source, self.pictures, i)
        image, changes = decode_picture(stored, where) if isinstance(stored, bytes) else (stored, ())
        if self.transform.apply is not scale and image.mode != "RGB":
            image = image.convert("RGB")
        with as_dataset_error(lambda why: f"{where} cannot be resized ({why}); replace or remove it"):
            packed = image if self.size is None else self.transform.apply(image, self.size)
        if packed is None:
            return Packed(None, (0, 0, ""), crc, ())
        return Packed(encode_png(packed), (*packed.size, packed.mode), crc, changes)


def packed_chunks(job: PackJob, start: int, workers: int) -> Generator[list[Packed], None, None]:
    """Yields the chunks of pictures from `start` on, in their order, while threads pack the next ones."""
    Image.init()
    starts = range(start, job.total, CHUNK)
    blocks = _imaging.get_blocks_max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes and metadata that are handled here
        _imaging.set_blocks_max(max(blocks, 4 * workers))  # memory that one picture leaves to the next
        try:
            yield from ahead(job.pack, starts, workers, waiting=AHEAD * workers - 1)
        finally:
            _imaging.set_blocks_max(blocks)
