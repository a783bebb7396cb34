"""The progress of a zip that is being prepared, in a hidden folder beside it: what to resume from after a kill.

The pictures that are done must still be those of the source, by name, size and content. If no file of the source has
changed since by its ctime, which `cp -p` and `rsync -t` set too, nothing is read; otherwise those pictures are read
again, and compared by their CRC-32s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from edmdistill.atomic import lock_folder
from edmdistill.data.pictures import Pictures
from edmdistill.errors import DatasetError, counted

RECORD, IMAGES = "record.json", "images"


class PrepareProgress(Struct):
    """The part that is done.

    Attributes:
        settings: all that decides the images but the source's content, as JSON.
        done: pictures of the source that are read.
        bytes: of their images.
        names_sha256, source_sha256: of the names and sizes of those pictures; and of the CRC-32s of their bytes too.
        changed: Pictures.changed of a source whose pictures are known to be those that are done.
        shape: width, height and mode of every image, or None before the first.
        changes: what the pictures had that their images do not, and how many of them.
    """

    settings: dict[str, Any]
    done: int = 0
    bytes: int = 0
    names_sha256: str = ""
    source_sha256: str = ""
    changed: int = 0
    shape: tuple[int, int, str] | None = None
    changes: dict[str, int] = field(default_factory=dict)


class PrepareState:
    """The progress of one zip, and where its parts are."""

    def __init__(self, out: Path, folder: Path, progress: PrepareProgress, overwrite: bool) -> None:
        self.out, self.folder, self.progress, self.overwrite = out, folder, progress, overwrite
        self.images = folder / IMAGES

    def require_same_source(self, pictures: Pictures, content: Callable[[int], str]) -> None:
        """Checks that the pictures that are done are still the first of the source; begins anew with `overwrite`.

        Args:
            content: returns PrepareProgress.source_sha256 of so many pictures of the source, which it reads.
        Raises: DatasetError: they are not, or cannot be read.
        """
        done, before = self.progress.done, self.progress.changed
        self.progress.changed = pictures.changed
        named = names_sha256(pictures.names[:done], pictures.sizes) == self.progress.names_sha256
        if named and (before == pictures.changed or content(done) == self.progress.source_sha256):
            return
        if not self.overwrite:
            raise DatasetError(
                f"the pictures have changed since {self.out} was begun: {self.progress.done:,} of them were done; "
                "begin anew with --overwrite"
            )
        self.progress = PrepareProgress(self.progress.settings, changed=pictures.changed)

    def add(self, name: str, size: int, crc: int, changes: Sequence[str], written: int) -> None:
        """Counts a picture as done: in one step, because Ctrl-C may come before any other.

        Args:
            written: bytes of all images so far.
        """
        progress = self.progress
        self.progress = replace(
            progress,
            done=progress.done + 1,
            bytes=written,
            names_sha256=chained(progress.names_sha256, f"{size} {name}"),
            source_sha256=chained(progress.source_sha256, f"{size} {name} {crc:08x}"),
            changes=dict(Counter(progress.changes) + Counter(changes)),
        )

    def save(self) -> None:
        """Stores the progress, once its images are on the disk.  Raises: OSError."""
        _store(self.folder, self.progress)

    def publish(self) -> None:
        """Moves the finished zip to its place."""
        self.images.replace(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)


def parts_folder(out: Path) -> Path:
    """Returns the hidden folder of an unfinished zip."""
    return out.with_name(f".{out.name}.parts")


def remove_leftovers(out: Path) -> None:
    """Removes the folder of a zip that is in its place already, where a kill came between: it holds no images."""
    folder = parts_folder(out)
    if folder.is_dir() and out.exists() and not (folder / IMAGES).exists():
        descriptor = _lock(folder, out)
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def open_state(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[PrepareState]:
    """Yields the progress of `out`, which no other process changes in the meantime.

    Where no image is written when the block fails, nothing is left.

    Raises: DatasetError: another process prepares it; or it was begun with other settings, and not `overwrite`; or the
        disk refuses.
    """
    folder = parts_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder, out)
        try:
            progress = _read(folder, out, dict(settings), overwrite)
            state = PrepareState(out, folder, progress, overwrite)
            try:
                yield state
            except BaseException:
                if not state.progress.bytes:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error.strerror or error}; what is done is kept") from error


def chained(digest: str, line: str) -> str:
    """Returns the sha256, in hex, of a digest and a line: a digest of all lines so far that can be stored."""
    return hashlib.sha256(f"{digest}\n{line}".encode(errors="surrogateescape")).hexdigest()


def names_sha256(names: Sequence[str], sizes: Sequence[int]) -> str:
    """Returns PrepareProgress.names_sha256 of pictures of these names and sizes in bytes."""
    digest = ""
    for name, size in zip(names, sizes, strict=False):
        digest = chained(digest, f"{size} {name}")
    return digest


def _lock(folder: Path, out: Path) -> int:
    descriptor = lock_folder(folder)
    if descriptor is None:
        raise DatasetError(f"{out} is being prepared by another process; wait for it, or choose another name")
    return descriptor


def _read(folder: Path, out: Path, settings: dict[str, Any], overwrite: bool) -> PrepareProgress:
    progress = None
    try:
        progress = msgspec.json.decode((folder / RECORD).read_bytes(), type=PrepareProgress)
    except FileNotFoundError:
        pass
    except msgspec.DecodeError as error:
        if not overwrite:
            raise DatasetError(f"{folder / RECORD} is damaged ({error}); begin {out} anew with --overwrite") from error
    if progress is not None and progress.settings == settings and _holds(folder / IMAGES, progress.bytes):
        return progress
    if progress is not None and progress.done and progress.settings != settings:
        others = sorted(key for key in settings if progress.settings.get(key) != settings[key])
        was, now = (", ".join(f"{key} {each.get(key)}" for key in others) for each in (progress.settings, settings))
        if not overwrite:
            raise DatasetError(
                f"{out} was begun with {was}, not {now}, and has {counted(progress.done, 'picture')}: give the same "
                "command to go on, or begin anew with --overwrite"
            )
    for entry in folder.iterdir():
        entry.unlink()
    _store(folder, new := PrepareProgress(settings))
    return new


def _holds(file: Path, size: int) -> bool:
    """Returns whether a file is there, of so many bytes or more."""
    return file.is_file() and file.stat().st_size >= size


def _store(folder: Path, progress: PrepareProgress) -> None:
    new = folder / f"{RECORD}.new"
    with new.open("wb") as file:
        file.write(json.dumps(msgspec.to_builtins(progress)).encode())
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / RECORD)
