"""Nothing half-written: a file or a folder is written aside and takes its place by a rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edmdistill.errors import CheckpointError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside `path`; what the block writes there, a file or a folder, becomes `path` when the block ends well.

    Whatever stood at `path` is replaced. A block that fails leaves `path` as it was, and nothing beside it.
    Raises: CheckpointError: the disk refuses.
    """
    mark = secrets.token_hex(4)
    new, old = (path.parent / f".{path.name}.{mark}.{what}" for what in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        for entry in (*new.rglob("*"), new):
            _sync(entry)
        try:
            if path.is_dir():  # only an empty folder is replaced by a rename; a full one has to make way
                path.rename(old)
            new.replace(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed has left aside in a folder; what it had set aside comes back.

    No other process may be writing there.
    """
    for entry in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.(new|old)", entry.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            entry.rename(folder / match[1])
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    """Waits until the disk has it: a rename that outlives a power cut must not outlive its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
