"""Logs of JSON objects, one per line, that survive a process killed while it writes.

A line counts once its newline is written: readers ignore a torn last line, and the next append cuts it off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edmdistill.progress import write

T = TypeVar("T", bound=Mapping[str, Any])


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends a JSON object to a log, which is created if it does not exist.  Raises: OSError: the disk refuses."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value).encode() + b"\n")


def read_lines(
    path: Path, type_: type[T], keys: Collection[str] = (), on_message: Callable[[str], object] = write
) -> list[T]:
    """Returns the lines of a log, none if it does not exist.

    Args:
        type_: of a line, for msgspec; infinity and NaN are numbers.
        keys: that a line must have, beyond what its type requires.
        on_message: called with a sentence about every damaged line, which is skipped.
    Raises: OSError: the file cannot be read.
    """
    return [value for value, _ in _lines(path, type_, keys, on_message)]


def truncate_lines(
    path: Path,
    type_: type[T],
    keep: Callable[[T], bool],
    keys: Collection[str] = (),
    on_message: Callable[[str], object] = write,
) -> None:
    """Truncates a log before its first line that is not to be kept.

    Args:
        keep: returns whether a line is kept.
        type_, keys, on_message: as for `read_lines`; damaged lines at the new end are removed too.
    Raises: OSError: the disk refuses.
    """
    size = 0
    for value, end in _lines(path, type_, keys, on_message):
        if not keep(value):
            break
        size = end
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _lines(
    path: Path, type_: type[T], keys: Collection[str], on_message: Callable[[str], object]
) -> Iterator[tuple[T, int]]:
    """Yields every valid line and the position of its end."""
    end = 0
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        end += len(line) + 1
        try:
            value = msgspec.convert(json.loads(line), type_)
            for key in keys:
                value[key]
        except (ValueError, KeyError, RecursionError, msgspec.ValidationError):
            on_message(f"{path}: line {number} is damaged and is skipped.")
            continue
        yield value, end
