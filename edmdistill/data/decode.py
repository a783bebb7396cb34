"""Decodes images and arrays from untrusted bytes: what a header claims is checked before the rest is read."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from edmdistill.data.files import as_dataset_error
from edmdistill.errors import DatasetError

RESOLUTION = 4096
"""The largest height and width that is read."""
FORMATS = ("PNG", "BMP", "WEBP", "JPEG")
"""Pillow's names."""
LOSSY = ("JPEG", "MPO", "WEBP")
"""An MPO is a JPEG followed by a preview, as phones write them."""
MODES = {
    "1": "black and white, one bit a pixel",
    "P": "colors from a palette",
    "PA": "colors from a palette",
    "LA": "transparency",
    "RGBA": "transparency",
    "CMYK": "colors for print",
    "I": "more than 8 bits a channel",
    "I;16": "more than 8 bits a channel",
    "F": "floating-point values",
}
GRID = "edmdistill"
"""The text by which our grids are marked: `MARK` of sampling/grid.py."""
_OTHER_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer, fetched by `git lfs pull`",
    b"<": "a web page or an SVG",
    b"GIF8": "a GIF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"P6": "a PPM",
    b"P5": "a PGM",
    b"\x00\x00\x00\x0cjP": "a JPEG 2000",
}


def decode_image(
    data: bytes, where: str, *, lossless: bool = False, on_turned: Callable[[], object] = lambda: None
) -> NDArray[np.uint8]:
    """Returns an image as stored: it is not turned upright, as NVIDIA's code turns none.

    Args:
        where: the set and the name of the file, for errors.
        lossless: refuse lossy formats.
        on_turned: called where its EXIF data say that it is to be turned.
    Returns: uint8 [C,H,W], C 1 or 3.
    Raises: DatasetError: it is not a PNG, BMP, WebP or JPEG, is broken, animated or larger than RESOLUTION, or its mode
        is not 8-bit grayscale or RGB; or it is a grid of samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes and EXIF data that are handled here
        with as_dataset_error(
            lambda why: f"{where} is not a readable image ({_describe(data, why)}); replace or remove it"
        ):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            refuse_grid(image, where)
            width, height = image.size
            if max(width, height) > RESOLUTION:
                raise DatasetError(f"{where} is {width}x{height}, larger than {RESOLUTION} pixels a side; resize it")
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise DatasetError(f"{where} is an animation of {frames} frames; keep one frame as a PNG")
            if lossless and image.format in LOSSY:
                raise DatasetError(f"{where} is a {image.format}, and lossy compression changes every metric; use PNGs")
            deep = image.format == "PNG" and data[24:25] == b"\x10"  # Pillow silently cuts RGB of 16 bits to 8
            if deep or image.mode not in ("L", "RGB"):
                kind = MODES["I"] if deep else MODES.get(image.mode, "other channels")
                how = "" if kind in (MODES["I"], MODES["F"]) else ", as `edmdistill data prepare` does"
                raise DatasetError(
                    f"{where} has mode {image.mode} ({kind}); convert it to 8-bit grayscale (L) or RGB{how}"
                )
            with as_dataset_error(lambda why: f"{where} is not a readable image ({why}); replace or remove it"):
                pixels = np.asarray(image)
                if is_turned(image):
                    on_turned()
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def is_grid(data: bytes) -> bool:
    """Returns whether a file is a grid of ours."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return GRID in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def refuse_grid(image: ImageFile.ImageFile, where: str) -> None:
    """Raises: DatasetError: a picture, of which the header was read, is a grid of ours."""
    if GRID in image.info:
        raise DatasetError(f"{where} is a grid of edmdistill, which shows many images side by side; move it elsewhere")


def is_turned(image: ImageFile.ImageFile) -> bool:
    """Returns whether the EXIF data of an image, which was read, say that it is to be turned or mirrored."""
    described = image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
    return bool(described) and image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _describe(data: bytes, why: str) -> str:
    """Returns what the bytes are instead of an image, where known; else why Pillow does not read them."""
    if data[4:8] == b"ftyp":
        return "a HEIC or AVIF"
    for magic, kind in _OTHER_FORMATS.items():
        if data.startswith(magic):
            return kind
    if not data:
        return "an empty file"
    return f"none of {', '.join(FORMATS)}" if why.startswith("cannot identify") else why


class Header(NamedTuple):
    """The header of an .npy; its values start at the byte `start`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(file: IO[bytes], size: int, where: str) -> Header:
    """Returns the header of an .npy and leaves the file where its values start.

    Args:
        size: of the whole file, in bytes.
        where: the set and the name of the file, for errors.
    Raises: DatasetError: there is no header, it claims Python objects or more than the file holds, or the values are
        not in C order.
    """
    with as_dataset_error(lambda why: f"{where} is not a readable array ({why}); replace or remove it"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
            if read is None:
                raise ValueError(f"version {version[0]}.{version[1]} of the format, which only structured arrays need")
            shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be read: they are pickles")
        if any(length < 0 for length in shape) or len(shape) > 8:
            raise ValueError(f"shape {list(shape)}"[:200])
        start = file.tell()
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > size - start:
            raise ValueError(f"its header claims {claimed:,} bytes, but there are {size - start:,}")
        if fortran and sum(length > 1 for length in shape) > 1:
            raise ValueError("its values are in Fortran order: save numpy.ascontiguousarray of it")
    return Header(shape, dtype, start)


def decode_array(data: bytes, where: str) -> NDArray[Any]:
    """Returns the array of an .npy in memory.  Raises: DatasetError: see `read_header`."""
    header = read_header(io.BytesIO(data), len(data), where)
    with as_dataset_error(lambda why: f"{where} is not a readable array ({why}); replace or remove it"):
        return np.frombuffer(data, header.dtype, math.prod(header.shape), header.start).reshape(header.shape)
