"""Reads MNIST's files, and those of the sets in its format, as EDM's dataset_tool.py does."""

from __future__ import annotations

import gzip
import math
import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edmdistill.atomic import require_no_pipe
from edmdistill.data.files import as_dataset_error
from edmdistill.data.pictures import Pictures
from edmdistill.errors import DatasetError

IMAGES = re.compile(r"(.*)-images[.-]idx3-ubyte(\.gz)?")
MAX_BYTES = 2**30
PADDED = {28: 32}
"""Height and width of MNIST, and what the official tool pads it to with black."""


def is_images(path: Path) -> bool:
    """Returns whether the file is called as MNIST's images are."""
    return IMAGES.fullmatch(path.name) is not None and not path.is_dir()


def open_mnist(path: Path, labels: str) -> Pictures:
    """Returns the pictures of a file of images, grayscale, with the classes in the file of labels beside it.

    Raises: DatasetError: a file is missing or damaged, or the two are of different sets; or classes are to come from
        folders.
    """
    if labels == "folders":
        raise DatasetError(f"{path} has no folders, from which --labels folders would take classes; leave it out")
    images = _read(path, 3)
    count, height, width = images.shape
    side = PADDED.get(height, height) if height == width else height
    border = (side - height) // 2
    padded = np.pad(images, [(0, 0), (border, border), (border, border)]) if border else images
    classes = None
    if labels == "auto":
        beside = path.with_name(re.sub(r"-images([.-])idx3", r"-labels\1idx1", path.name))
        classes = _read(beside, 1).astype(np.int64)
        if len(classes) != count:
            raise DatasetError(f"{beside} labels {len(classes):,} images, but {path} holds {count:,}; get both again")
    return Pictures(
        "MNIST",
        [f"image {i}" for i in range(count)],
        [width * height] * count,
        lambda i: Image.fromarray(padded[i]),
        classes,
        None if classes is None else [str(digit) for digit in range(int(classes.max(initial=9)) + 1)],
        notes=[f"{width}x{height} padded with black to {side}x{side}, as EDM's tool does"] if border else [],
    )


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Returns the array of an idx file."""
    require_no_pipe(path, DatasetError)
    with (
        as_dataset_error(lambda why: f"{path} is not a whole file of MNIST's format ({why}); download it again"),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        kind, *shape = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
        size = math.prod(shape)
        if kind != 0x800 + dimensions or not 0 < size <= MAX_BYTES:
            raise ValueError(f"it begins with {kind:#x} and {shape}")
        data = file.read(size)
        if len(data) < size or file.read(1):
            raise ValueError(f"its header says {size:,} bytes, and it has {'more' if len(data) == size else 'fewer'}")
        return np.frombuffer(data, np.uint8).reshape(shape)
