"""The pictures of a source, decoded as EDM2's dataset_tool.py does: any mode becomes RGB, and what is lost is named."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from edmdistill.data.decode import is_turned, refuse_grid
from edmdistill.data.files import as_dataset_error
from edmdistill.data.transforms import MAX_PIXELS

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
"""Pillow's names."""
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs"),
)
REFUSED = (
    *(".blp", ".bufr", ".bw", ".cur", ".dcx", ".dds", ".emf", ".eps", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu"),
    *(".gbr", ".grib", ".h5", ".hdf", ".icb", ".icns", ".ico", ".iim", ".im", ".mpeg", ".mpg", ".msp", ".palm"),
    *(".pcd", ".pcx", ".pdf", ".pfm", ".ps", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".vda", ".vst"),
    *(".wmf", ".xbm", ".xpm", ".jxl", ".heic", ".heif", ".exr", ".hdr", ".svg", ".dng"),
)
"""Suffixes that the official tool takes for pictures beside those: to leave these out would renumber the rest."""
LARGE = 2**24
"""Pixels of a picture from which on only one is decoded at a time."""

GRAYSCALE, PALETTE, TRANSPARENCY = "grayscale, now RGB", "a palette, now RGB", "transparency, dropped without blending"
DEEP, CLIPPED = "16 bits a channel, now 8", "gray of more than 8 bits, cut off at 255"
CMYK = "CMYK, now RGB without a color profile"
TURNED, ANIMATED = "an EXIF orientation, ignored", "several frames, the first kept"
OTHER = "another color space, now RGB"
_MODES = {
    **dict.fromkeys(("1", "L", "La", "LA"), GRAYSCALE),
    **dict.fromkeys(("P", "PA"), PALETTE),
    **dict.fromkeys(("I", "F", "I;16", "I;16L", "I;16B", "I;16N"), CLIPPED),
    "CMYK": CMYK,
}
_large = threading.Lock()


@dataclass(frozen=True)
class Pictures:
    """The pictures of a source, in the order in which the official tool numbers them.

    Attributes:
        kind: what the source is, in words.
        names: of each picture, in the source.
        sizes: bytes of each as stored; 0 where that is not known before it is read.
        read: returns picture i, as stored or decoded; several threads may call it.
        labels: the class of each, int64 [N], or None.
        label_names: the name of each class, or None.
        left_out: the reason for every file that is no picture, by name.
        notes: sentences on what the user may not expect.
        changed: when the last of the source's files was changed, in nanoseconds (st_ctime_ns).
    """

    kind: str
    names: Sequence[str]
    sizes: Sequence[int]
    read: Callable[[int], bytes | Image.Image]
    labels: NDArray[np.int64] | None = None
    label_names: Sequence[str] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    changed: int = 0


class Decoded(NamedTuple):
    """A picture, RGB, and what the official tool changes of it silently: the constants above."""

    image: Image.Image
    changes: tuple[str, ...]


def decode_picture(data: bytes, where: str) -> Decoded:
    """Returns a picture as the official tool reads it: the first frame, as stored, not turned upright, RGB.

    Args:
        where: the source and the name of the file, for errors.
    Raises: DatasetError: it is none of FORMATS, broken, larger than Pillow allows, or a grid of samples.
    """
    with (
        as_dataset_error(lambda why: f"{where} is not a readable picture ({_reason(data, why)}); replace or remove it"),
        Image.open(io.BytesIO(data), formats=FORMATS) as image,
    ):
        refuse_grid(image, where)
        width, height = image.size
        if width * height > MAX_PIXELS:  # Pillow has the same limit, which its user may have lifted
            raise ValueError(f"{width:,}x{height:,}, and at most {MAX_PIXELS:,} pixels are read")
        if width * height < LARGE:
            return _decode(image, data)
        with _large:
            return _decode(image, data)


def _decode(image: ImageFile.ImageFile, data: bytes) -> Decoded:
    mode = image.mode
    deep = image.format == "PNG" and data[24:25] == b"\x10"
    image.decodermaxblock = max(len(data), image.decodermaxblock)  # all bytes at once, not in blocks of 64 KiB
    image.load()
    changes = [DEEP] if deep else []
    if mode not in ("RGB", "RGBA"):
        changes = [_MODES.get(mode, OTHER)]
    if mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        changes.append(TRANSPARENCY)
    # A TIFF was turned by Pillow, for the official tool too.
    changes += [TURNED] if image.format != "TIFF" and is_turned(image) else []
    # An MPO is a JPEG followed by a preview.
    changes += [ANIMATED] if image.format != "MPO" and getattr(image, "is_animated", False) else []
    return Decoded(image if mode == "RGB" else image.convert("RGB"), tuple(changes))


def _reason(data: bytes, why: str) -> str:
    if why.startswith("cannot identify"):
        return f"none of {', '.join(FORMATS)}" if data else "an empty file"
    return why
