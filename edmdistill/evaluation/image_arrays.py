"""Images in an .npz or .npy, read a few at a time; what their headers claim is checked before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edmdistill.data.decode import Header, decode_array, read_header
from edmdistill.data.files import ZipFiles, as_dataset_error
from edmdistill.data.npz import array_names
from edmdistill.errors import DatasetError, counted, printable

IMAGES = "images", "arr_0"
"""The arrays of images in an .npz: ours, and ADM's."""


class Rows:
    """Gives images of an array in a file, in batches that follow one another; none is kept in memory.

    Args:
        open: the file at its first byte.
        header: of its array, uint8 [N,H,W,C].
        where: what errors call it.
    """

    def __init__(self, open: Callable[[], IO[bytes]], header: Header, where: str) -> None:
        self.header = header
        self._open, self._where = open, where
        self._file: IO[bytes] | None = None

    def __call__(self, rows: range) -> Tensor:
        shape = self.header.shape
        size = math.prod(shape[1:])
        start = self.header.start + rows.start * size
        with as_dataset_error(lambda why: f"{self._where} cannot be read to its end ({why}); make it again"):
            if self._file is None or self._file.closed:
                self._file = self._open()
            if self._file.tell() != start:
                self._file.seek(start)
            data = self._file.read(len(rows) * size)
            if len(data) < len(rows) * size:
                raise EOFError(f"it ends in image {rows.start + len(data) // size} of {shape[0]}")
            if rows.stop == shape[0]:
                self._file.read(1)  # at the end of a zip's member its CRC is checked
                self._file.close()
        pixels = np.frombuffer(data, np.uint8).reshape(len(rows), *shape[1:])
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def open_npy(path: Path) -> Rows:
    with (
        as_dataset_error(lambda why: f"{path} cannot be read ({why}); give images as uint8 [N,H,W,C]"),
        path.open("rb") as file,
    ):
        header = read_header(file, path.stat().st_size, str(path))
    _require_images(header, str(path))
    return Rows(lambda: path.open("rb"), header, str(path))


def open_npz(path: Path) -> tuple[Rows, Tensor | None, list[int] | None]:
    """Returns the images of an .npz, their classes [N] and their seeds; a class of -1 is none."""
    files = ZipFiles(path)
    names = array_names(files)
    name, also = ("images", "labels") if "images" in names else ("arr_0", "arr_1")
    if name not in names:
        raise DatasetError(_no_images(path, names))
    stored, where = f"{name}.npy", f"{path}: {name}"
    with as_dataset_error(lambda why: f"{where} cannot be read ({why}); write it again"):
        file, size = files.stream(stored)
        with file:
            header = read_header(file, size, where)
    _require_images(header, where)

    def column(key: str) -> NDArray[np.int64] | None:
        if key not in names:
            return None
        with as_dataset_error(lambda why: f"{path}: {key} cannot be read ({why}); write it again"):
            values: NDArray[Any] = decode_array(files.read(f"{key}.npy"), f"{path}: {key}")
        if values.shape != header.shape[:1] or values.dtype.kind not in "iu" or values.max() >= 2**63:
            raise DatasetError(
                f"{path}: {key} are {values.dtype} {list(values.shape)}, but an integer for each of the "
                f"{header.shape[0]} images was expected"
            )
        return values.astype(np.int64)

    labels, seeds = column(also), column("seeds")
    if labels is not None and (labels < 0).any():
        if labels.max() >= 0:
            raise DatasetError(
                f"{path}: {also} has classes and, for {counted(int((labels < 0).sum()), 'image')}, none; label all"
            )
        labels = None
    rows = Rows(lambda: files.stream(stored)[0], header, where)
    return rows, None if labels is None else torch.from_numpy(labels), None if seeds is None else seeds.tolist()


def _no_images(path: Path, names: Sequence[str]) -> str:
    """Returns a sentence on an .npz that holds other arrays."""
    if "mu" in names and "sigma" in names:
        return (
            f"{path} holds the statistics of a reference (mu and sigma) and no images; give images to be measured, and "
            "as --ref the images that these statistics are of"
        )
    members = ", ".join(printable(name) for name in names[:5]) or "nothing"
    hint = "; decode latents first" if "latents" in names else ""
    return f"{path} holds {members}, but images or arr_0 were expected, uint8 [N,H,W,C]{hint}"


def _require_images(header: Header, where: str) -> None:
    """Raises DatasetError unless an array holds images, uint8 [N,H,W,C], C 1 or 3."""
    shape, hint = header.shape, ""
    if header.dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3):
        if 0 in shape:
            raise DatasetError(f"{where} is empty, uint8 {list(shape)}; give images to be measured")
        return
    if header.dtype.kind == "f":
        hint = "; turn [-1, 1] into uint8 by (127.5 * x + 128).clip(0, 255).astype('uint8')"
    elif len(shape) == 4 and shape[1] in (1, 3):
        hint = "; move the channels to the end by .transpose(0, 2, 3, 1)"
    elif len(shape) == 3:
        hint = "; give gray images an axis of channels by [..., None]"
    raise DatasetError(f"{where}: images are {header}, but uint8 [N,H,W,C] of 1 or 3 channels were expected{hint}")
