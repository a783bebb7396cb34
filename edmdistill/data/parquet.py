"""Reads a Hugging Face data set of images in parquet files."""

from __future__ import annotations

import bisect
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edmdistill.atomic import require_no_pipe
from edmdistill.data.files import as_dataset_error
from edmdistill.data.labels import MAX_CLASSES
from edmdistill.data.pictures import Pictures
from edmdistill.errors import DatasetError, counted, did_you_mean, printable
from edmdistill.optional import importing

SPLITS = {"train": ("train",), "test": ("test",), "validation": ("validation", "valid", "val")}
LABELS = ("label", "labels", "fine_label", "cls")
"""Columns that hold classes, where the data set does not say."""
ROW_GROUP_BYTES = 2**32


def is_parquet(path: Path) -> bool:
    """Returns whether the file is in the parquet format."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def find_parts(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns the parquet files of a folder in their order, where it holds some; hidden ones are none."""
    return [folder / name for name in sorted(names) if name.endswith(".parquet") and "/." not in f"/{name}"]


def open_parquet(parts: Sequence[Path], path: Path, labels: str, split: str) -> Pictures:
    """Returns the pictures of a split in the order of files and rows.

    Args:
        parts: all files; where their names name splits, those of other splits are left out.
        path: of the file, or of the folder that holds them.
    Raises: DatasetError: pyarrow cannot be imported; there is no such split, no column of images, or a damaged file; or
        classes are to come from folders.
    """
    if labels == "folders":
        raise DatasetError(f"{path} holds parquet files, whose folders are no classes; leave --labels out")
    with importing("pyarrow", extra="parquet", needed_by="a parquet file needs", error=DatasetError):
        import pyarrow  # noqa: F401
    by_split = _by_split(parts, path, split)
    chosen = by_split.get(split) or list(parts)
    table = _Table(chosen)
    image, label, names = _columns(table.schema, chosen[0])
    classes = None
    if labels == "auto" and label is not None:
        classes = table.integers(label)
        if classes.min(initial=0) < 0:
            raise DatasetError(
                f"{path} has pictures without a class in its column {label!r}; --labels none leaves it out"
            )
        limit = len(names or range(MAX_CLASSES))
        if (largest := int(classes.max(initial=0))) >= limit:
            known = counted(limit, "name") if names else f"at most {limit:,} classes are read"
            raise DatasetError(
                f"{path} has the class {largest:,} in its column {label!r}, but {known}; --labels none leaves it out"
            )
    rows = range(table.rows)
    return Pictures(
        f"parquet, {split}" if split in by_split else "parquet",
        [f"{table.parts[part].name}, row {row}" for part, row in map(table.place, rows)],
        [0] * len(rows),
        lambda i: table.picture(image, i),
        classes,
        names if classes is not None else None,
        {str(part.relative_to(path)): "of another split" for part in parts if part not in chosen},
    )


def _by_split(parts: Sequence[Path], path: Path, split: str) -> dict[str, list[Path]]:
    """Returns the files by the split that a word of their names or folders names; empty, where none does.

    Raises: DatasetError: there is no such split.
    """
    if split not in SPLITS:
        raise DatasetError(f"the split {split!r} is not known; {did_you_mean(split, SPLITS)}")
    by_split: dict[str, list[Path]] = {}
    for part in parts:
        words = re.split(r"[/\\.-]", str(part.relative_to(path)).lower())
        key = next((key for key, names in SPLITS.items() if set(names) & set(words)), "")
        by_split.setdefault(key, []).append(part)
    if by_split.keys() == {""}:
        return {}
    if split not in by_split:
        raise DatasetError(f"{path} has no split {split!r}; choose one of {', '.join(filter(None, by_split))}")
    return by_split


def _columns(schema: Any, path: Path) -> tuple[str, str | None, list[str] | None]:
    """Returns the columns of images and of classes, if there is one, and the names of the classes.

    They are those that the data set's own description says, or else of the usual types and names.
    """
    import pyarrow.types as types

    features: dict[str, Any] = {}
    if described := (schema.metadata or {}).get(b"huggingface"):
        with as_dataset_error(lambda why: f"{path} describes its columns in a way that is not read ({why})"):
            features = json.loads(described)["info"]["features"]

    def kind(name: str) -> object:
        feature = features.get(name)
        return feature.get("_type") if isinstance(feature, Mapping) else None

    def holds_bytes(type_: Any) -> bool:
        at = type_.get_field_index("bytes") if types.is_struct(type_) else -1
        return at >= 0 and (types.is_binary(type_.field(at).type) or types.is_large_binary(type_.field(at).type))

    images = [field.name for field in schema if holds_bytes(field.type)]
    image = next((name for name in images if kind(name) == "Image"), next(iter(images), None))
    if image is None:
        raise DatasetError(
            f"{path} has no column of images, a struct of bytes and path, but {_short(schema.names)}; give a set "
            "of pictures"
        )
    integers = [f.name for f in schema if types.is_integer(f.type)]
    usual = (name for name in LABELS if name in integers)
    label = next((name for name in integers if kind(name) == "ClassLabel"), next(usual, None))
    names = features[label].get("names") if label is not None and kind(label) == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        return image, label, None
    return image, label, [printable(name) for name in names]


class _Table:
    """The rows of several parquet files of one schema.

    Raises: DatasetError: a file is damaged, or of another schema than the first.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        from pyarrow.parquet import ParquetFile

        self.parts, self._files, self._starts = list(parts), [], [0]
        self._lock = threading.Lock()
        for part in parts:
            require_no_pipe(part, DatasetError)
            with as_dataset_error(_damaged(str(part))):
                self._files.append(ParquetFile(part))
            self._starts.append(self._starts[-1] + self._files[-1].metadata.num_rows)
            if self._files[-1].schema_arrow.names != self.schema.names:
                raise DatasetError(f"{part} has other columns than {parts[0]}; give one data set")
        self.rows = self._starts[-1]
        self._group = lru_cache(maxsize=2)(self._read_group)

    @property
    def schema(self) -> Any:
        return self._files[0].schema_arrow

    def place(self, i: int) -> tuple[int, int]:
        """Returns the file of row i, and its row there."""
        part = bisect.bisect_right(self._starts, i) - 1
        return part, i - self._starts[part]

    def integers(self, column: str) -> NDArray[np.int64]:
        """Returns a column, int64 [N]; -1 where it is null."""
        values = []
        for part, file in zip(self.parts, self._files, strict=True):
            with as_dataset_error(_damaged(str(part))):
                values.append(file.read([column])[column].fill_null(-1).to_numpy().astype(np.int64))
        return np.concatenate(values)

    def picture(self, column: str, i: int) -> bytes:
        """Returns the bytes of the picture in row i."""
        part, row = self.place(i)
        with as_dataset_error(_damaged(f"{self.parts[part]}, row {row},")):
            group, start = 0, 0
            metadata = self._files[part].metadata
            while row >= start + metadata.row_group(group).num_rows:
                start += metadata.row_group(group).num_rows
                group += 1
            with self._lock:  # a file has one position
                cells = self._group(part, group, column)
            data = cells[row - start].as_py()
            if data is None:
                raise ValueError("it is empty, or names a file instead of holding a picture")
            assert isinstance(data, bytes)
            return data

    def _read_group(self, part: int, group: int, column: str) -> Any:
        file = self._files[part]
        if file.metadata.row_group(group).total_byte_size > ROW_GROUP_BYTES:
            raise ValueError(f"a group of rows takes more than {ROW_GROUP_BYTES:,} bytes")
        return file.read_row_group(group, [f"{column}.bytes"])[column].combine_chunks().field("bytes")


def _damaged(where: str) -> Callable[[str], str]:
    return lambda why: f"{where} cannot be read ({why}); download it again"


def _short(names: Sequence[str]) -> str:
    return printable(", ".join(names))[:200]
