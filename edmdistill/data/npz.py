"""Reads the arrays of an untrusted .npz."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edmdistill.data.decode import read_header
from edmdistill.data.files import ZipFiles, as_dataset_error
from edmdistill.errors import DatasetError, printable


def array_names(files: ZipFiles) -> list[str]:
    """Returns the names of the arrays of an .npz.  Raises: DatasetError: it has one twice."""
    counts = Counter(member.name.removesuffix(".npy") for member in files.members())
    for name, count in counts.items():
        if count > 1:
            raise DatasetError(f"{files.path} holds {printable(name)} twice; write it again")
    return list(counts)


class Npz:
    """The arrays of an .npz.

    Attributes:
        names: of the arrays.
    Raises: DatasetError: it is damaged, or has a name twice.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._files = path, ZipFiles(path)
        self.names = set(array_names(self._files))

    def read(self, name: str, limit: int) -> NDArray[Any]:
        """Returns an array of at most `limit` entries.

        Raises: DatasetError: it is not there, is larger, holds objects, or cannot be read.
        """
        where = f"{self.path}: {printable(name)}"
        if name not in self.names:
            raise DatasetError(f"{where} is missing; write the file again")
        with as_dataset_error(lambda why: f"{where} cannot be read ({why}); write it again"):
            file, size = self._files.stream(f"{name}.npy")
            with file:
                header = read_header(file, size, where)
                count = math.prod(header.shape)
                if count > limit:
                    raise ValueError(f"it has {count:,} entries, and at most {limit:,} are read")
                data = file.read(count * header.dtype.itemsize)
                file.read(1)  # at the end of a zip's member its CRC is checked
            return np.frombuffer(data, header.dtype, count).reshape(header.shape)
