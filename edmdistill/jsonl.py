"""Logs of JSON objects, one a line, that survive a process killed while it writes.

A line counts once its newline is written: a torn last line is dropped by every reader, and cut off by the next append.
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
    """Appends a JSON object to a log, which is made if it is not there.  Raises: OSError: the disk refuses."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value).encode() + b"\n")


def read_lines(
    path: Path, type_: type[T], keys: Collection[str] = (), note: Callable[[str], object] = write
) -> list[T]:
    """Returns the lines of a log, none where there is no log.

    Args:
        type_: of a line, as msgspec knows it; infinity and NaN are numbers.
        keys: that a line must have, where its type does not say so.
        note: gets a sentence about every line that is damaged and passed over.
    Raises: OSError: the file cannot be read.
    """
    return [value for value, _ in _lines(path, type_, keys, note)]


def truncate_lines(
    path: Path,
    type_: type[T],
    wanted: Callable[[T], bool],
    keys: Collection[str] = (),
    note: Callable[[str], object] = write,
) -> None:
    """Cuts a log off before its first line that is not wanted.

    Args:
        type_, keys, note: as for `read_lines`; damaged lines at the new end go too.
    Raises: OSError: the disk refuses.
    """
    kept = 0
    for value, end in _lines(path, type_, keys, note):
        if not wanted(value):
            break
        kept = end
    if path.exists() and path.stat().st_size > kept:
        os.truncate(path, kept)


def _lines(path: Path, type_: type[T], keys: Collection[str], note: Callable[[str], object]) -> Iterator[tuple[T, int]]:
    """Yields every sound line and the position of its end."""
    end = 0
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(whole, 1):
        end += len(line) + 1
        try:
            value = msgspec.convert(json.loads(line), type_)
            for key in keys:
                value[key]
        except (ValueError, KeyError, RecursionError, msgspec.ValidationError):
            note(f"{path}: line {number} is damaged and is passed over.")
            continue
        yield value, end
