"""Atomic writes: a file or folder is written in a scratch folder beside its destination, and moved there in one step.

A process may be killed at any time: the destination then holds either the old content or the new, whole. Only a living
writer holds the lock of its scratch folder, so the next writer to the same destination removes one that was left over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from edmdistill.errors import CheckpointError, EdmDistillError

SCRATCH = re.compile(r"\.(.+)\.[0-9a-f]{8}\.new")
REPLACED = ".old"
"""Suffix of a replaced folder in the scratch folder, where the system cannot exchange two folders."""


@contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields a path of the same name; the file or folder that the block writes there replaces `path`.

    If the block fails, `path` stays as it was, and nothing is left beside it. A symbolic link is followed, and stays.
    Files get the mode that the umask gives, whichever library writes them.

    Args:
        replace: whether anything at `path` but an empty folder may be replaced.
    Raises:
        CheckpointError: the disk refuses, or `path` is a device or a pipe.
        FileExistsError: something at `path` may not be replaced.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    try:
        if is_pipe(path):
            raise CheckpointError(f"{path} is a device or a pipe, not a file or folder: choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with _scratch(path) as scratch:
            new = scratch / path.name
            try:
                yield new
            except CheckpointError as error:
                # A file inside is not to be named by its path in the scratch folder.
                if str(new) in str(error):
                    raise type(error)(str(error).replace(str(new), str(path))) from error
                raise
            mode = scratch.stat().st_mode & 0o666  # as the umask left it
            for entry in (*new.rglob("*"), new):
                if entry.is_file():
                    entry.chmod(mode | entry.stat().st_mode & 0o111)
                _sync(entry)
            if not replace and path.exists() and not _is_empty_folder(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            _move(new, path)
            _sync(path.parent)
    except OSError as error:
        if isinstance(error, FileExistsError) and not replace and error.filename == str(path):
            raise
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def require_free(path: Path, overwrite: bool) -> None:
    """Requires that nothing is at `path`, where a command is to write what it makes.

    Raises: EdmDistillError: something is, and not `overwrite`.
    """
    if path.exists() and not overwrite:
        raise EdmDistillError(f"{path} already exists: choose another name, or add --overwrite")


def unwritable(path: Path) -> Path | None:
    """Returns the nearest folder above a path that exists, if this user may not write there; else None."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else nearest


def exists(path: Path) -> bool:
    """Returns whether something is at a path; unlike Path.exists, which from Python 3.14 on says False where it cannot
    be known.

    Raises: OSError: the name is too long, or a folder above may not be entered.  ValueError: it holds a NUL.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def reachable(path: Path) -> Path:
    """Returns the path, whether something is there or not.  Raises: CheckpointError: `exists` cannot say."""
    try:
        exists(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(path)[:200]} cannot be reached ({reason}): give another path") from error
    return path


def is_pipe(path: Path) -> bool:
    """Returns whether a pipe, a socket or a device is at a path; False where nothing can be known."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def require_no_pipe(path: Path, error: type[EdmDistillError] = CheckpointError) -> None:
    """Requires that no pipe, socket or device is at `path`, which is to be read from any place, or more than once.

    Reading a pipe waits, perhaps for ever, for someone to write to it; what is read once, from its first byte to its
    last, may come from one.

    Raises: `error`.
    """
    if is_pipe(path):
        raise error(f"{path} is a pipe or a device: write its contents to a file, and use that")


def expanded(path: str | Path) -> Path:
    """Returns a path with the home folder in place of ~ or ~user, whether something is there or not.

    Raises: CheckpointError: there is no such home folder, or the path is empty or cannot be reached.
    """
    if not str(path):  # of which Path would make the working directory
        raise CheckpointError("the path is empty: name a file or folder")
    try:
        return reachable(Path(path).expanduser())
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} names a user who does not exist on this machine, or has no home folder: write the path in full"
        ) from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the scratch folders of writers that were killed; a folder that one of them was replacing is put back.

    Args:
        name: of the file or folder that they were writing; None: any in the folder.
    """
    for scratch in folder.iterdir():
        match = SCRATCH.fullmatch(scratch.name)
        if match is None or (name is not None and match[1] != _short(name)):
            continue
        with suppress(OSError):  # it belongs to a living writer, or another process removes it
            descriptor = os.open(scratch, os.O_RDONLY)
            try:
                if not lock(descriptor):
                    continue
                for replaced in scratch.glob(f"*{REPLACED}"):
                    path = folder / replaced.name.removesuffix(REPLACED)
                    if not path.exists():
                        replaced.rename(path)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a folder among the system's temporary files; those of killed processes are removed first."""
    path = Path(tempfile.gettempdir()) / "edmdistill"
    remove_leftovers(path.parent, path.name)
    with _scratch(path) as folder:
        folder.chmod(0o700)
        yield folder


def lock(file: int | IO[Any], *, wait: bool = False) -> bool | None:
    """Locks a file or folder against other processes, until it is closed.

    Args:
        file: open, or its descriptor.
        wait: until no other process has the lock.
    Returns: False: another process has the lock.  None: the file system has none, as some of networks do.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock_folder(folder: Path) -> int | None:
    """Locks a folder against other processes, for as long as the descriptor that is returned is open.

    On a file system without locks every process gets one.

    Returns: None: another process has the lock, or has just removed the folder.
    Raises: OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(FileNotFoundError):
        if lock(descriptor) is not False and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    os.close(descriptor)
    return None


def sha256_file(path: Path) -> str:
    """Returns the digest of a file's content, in hex.  Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, locked while the block runs and removed after it."""
    descriptor = None
    while descriptor is None:
        scratch = path.parent / f".{_short(path.name)}.{secrets.token_hex(4)}.new"
        scratch.mkdir()
        descriptor = lock_folder(scratch)  # or it was taken for a leftover before that
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _short(name: str) -> str:
    """Returns the name, or its digest if it is too long for the name of a scratch folder."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _move(new: Path, path: Path) -> None:
    """Moves `new` to `path`; what was there stays in the scratch folder."""
    if not path.is_dir() or _is_empty_folder(path):  # a rename replaces these
        new.replace(path)
    elif not _exchange(new, path):
        replaced = new.with_name(path.name + REPLACED)
        try:
            path.rename(replaced)
            new.rename(path)
        except BaseException:  # Ctrl-C between the two, too
            if not path.exists():
                replaced.rename(path)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step.  Returns: False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, bytes(a), here, bytes(b), swap)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(bytes(a), bytes(b), swap)
    else:
        return False
    return not failed


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk: after a power cut, no rename may survive without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
