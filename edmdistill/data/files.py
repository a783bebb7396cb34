"""The files of a data set: the members of a zip or a folder, whether they can be read, and their bytes."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from edmdistill.atomic import require_no_pipe
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import DatasetError, EdmDistillError, printable

MEMBER_BYTES = 2**27
"""The largest file of a set that is read: more than the largest image, or the labels of a million images."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Python can bound what these decompress to; bzip2 and LZMA expand a few bytes to gigabytes before it looks."""
EXPECTED = f"give a zip, a folder, or the word {' or '.join(EMBEDDED)}"
BROKEN_LINK = "a broken link"

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_ARCHIVES = {
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"(\xb5/\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
}
_FORMATS = {
    b"\x89PNG": "a single image",
    b"\xff\xd8\xff": "a single image",
    b"GIF8": "a single image",
    b"BM": "a single image",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer",
}


class Member(NamedTuple):
    """A file of a set.

    Attributes:
        name: its path inside the set, as stored.
        size: bytes, uncompressed.
        crc: CRC-32 of its bytes, or None if unknown before they are read.
        problem: why it cannot be read, as the end of a sentence that begins with its name, or None.
    """

    name: str
    size: int
    crc: int | None = None
    problem: str | None = None


class Files(Protocol):
    """A zip or a folder. It can be pickled, for worker processes."""

    path: Path

    def members(self) -> list[Member]: ...

    def read(self, name: str) -> bytes: ...


def canonical_name(name: str) -> str:
    """Returns a member's name as names are compared: `inner_path` with composed accents."""
    return inner_path(name if name.isascii() else unicodedata.normalize("NFC", name))


def inner_path(name: str) -> str:
    """Returns a member's name with slashes between folders, as in zips of Windows too, and no leading dot or slash."""
    name = name.replace("\\", "/")
    if name.startswith(("/", ".")) or "//" in name or "/./" in name:
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


@contextmanager
def as_dataset_error(sentence: Callable[[str], str]) -> Iterator[None]:
    """Raises DatasetError in place of anything that a decoder of untrusted bytes raises.

    Args:
        sentence: from the reason, one printable line, to the error's message.
    """
    try:
        yield
    except EdmDistillError:
        raise
    except Exception as error:  # decoders raise nearly any type on malicious bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DatasetError(sentence(printable(reason[:200]))) from error


class ZipFiles:
    """The members of a zip; every process opens its own handle, because a shared one has a single position."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        """Raises: DatasetError: it is not a whole zip."""
        with (
            as_dataset_error(lambda why: f"{self.path} cannot be read ({why}); {EXPECTED}"),
            self.path.open("rb") as file,
        ):
            head = file.read(512)
            size = file.seek(0, os.SEEK_END)
        if not head.startswith(b"PK"):
            raise DatasetError(f"{self.path} is {_other_kind(head)}")
        with as_dataset_error(
            lambda why: (
                f"{self.path} is not a whole zip ({why}): it was cut off at {size:,} bytes or damaged; copy it again"
            )
        ):
            archive = zipfile.ZipFile(self.path)
        weakref.finalize(self, archive.close)
        return archive

    def members(self) -> list[Member]:
        return [
            Member(info.filename, info.file_size, info.CRC, _zip_problem(info) or too_large(info.file_size))
            for info in self.archive.infolist()
            if not info.filename.endswith(("/", "\\"))  # is_dir() fails on an empty name
        ]

    def read(self, name: str) -> bytes:
        info = self.archive.getinfo(name)
        _require(self.path, Member(name, info.file_size, None, _zip_problem(info) or too_large(info.file_size)))
        with self.archive.open(info) as file:
            # A read of a given length limits what is decompressed, whatever the directory declares.
            data = file.read(info.file_size)
            if len(data) < info.file_size:
                raise EOFError(f"it ends after {len(data):,} of {info.file_size:,} bytes")
            return data

    def stream(self, name: str) -> tuple[IO[bytes], int]:
        """Opens a member of any size as a stream, and returns its size in bytes.  Raises: DatasetError: unreadable."""
        info = self.archive.getinfo(name)
        _require(self.path, Member(name, info.file_size, None, _zip_problem(info)))
        return self.archive.open(info), info.file_size

    def __reduce__(self) -> tuple[type[ZipFiles], tuple[Path]]:
        return ZipFiles, (self.path,)


class FolderFiles:
    """The files of a folder and its subfolders; links are followed, and no folder is read twice.

    Attributes:
        changed: when the last of the files that were listed was changed, in nanoseconds (st_ctime_ns).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, 0

    def members(self) -> list[Member]:
        """Raises: DatasetError: a subfolder cannot be listed, or a link leads back to a folder of this set."""
        members: list[Member] = []
        seen: dict[tuple[int, int], str] = {}
        todo = [""]
        while todo:
            folder = todo.pop()
            try:
                status = os.stat(self.path / folder)
                entries = sorted(os.scandir(self.path / folder), key=lambda entry: entry.name)
            except OSError as error:
                where = printable(str(self.path / folder))
                advice = "move or remove it" if error.errno == errno.ENAMETOOLONG else "change its permissions"
                raise DatasetError(f"{where} cannot be listed ({error.strerror}); {advice}") from error
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                raise DatasetError(
                    f"{self.path}: {printable(first or '.')} and {printable(folder)} are the same folder through a "
                    "link, so its images would count twice; remove the link"
                )
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                member, is_folder = self._stat(name)
                if is_folder or entry.is_dir(follow_symlinks=False):  # one that cannot be reached, too
                    todo.append(name)
                else:
                    members.append(member)
        return members

    def _stat(self, name: str) -> tuple[Member, bool]:
        """Returns the file of a name, links followed, and whether it is a folder."""
        try:
            status = os.stat(self.path / name)
        except OSError as error:
            link = os.path.islink(self.path / name)
            return Member(name, 0, None, f"is {BROKEN_LINK}" if link else f"cannot be read: {error.strerror}"), False
        if not stat.S_ISREG(status.st_mode):
            return Member(name, 0, None, f"is {_kind(status.st_mode)} and not a file"), stat.S_ISDIR(status.st_mode)
        self.changed = max(self.changed, status.st_ctime_ns)
        return Member(name, status.st_size, None, too_large(status.st_size)), False

    def read(self, name: str) -> bytes:
        member = self._stat(name)[0]
        _require(self.path, member)
        with (self.path / name).open("rb") as file:
            return file.read(member.size)


def status_of(path: Path, expected: str) -> os.stat_result:
    """Returns the status of a data set's file or folder.

    Args:
        expected: ends the sentence: what to give.
    Raises: DatasetError: there is none, or it cannot be reached.
    """
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} does not exist; {expected}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{printable(str(path))} cannot be opened ({reason}); {expected}") from error


def open_files(path: Path, expected: str = EXPECTED) -> Files:
    """Returns the files of a zip or a folder.

    Args:
        expected: as of `status_of`.
    Raises: DatasetError: there is none, or it is something else.
    """
    mode = status_of(path, expected).st_mode
    if stat.S_ISDIR(mode):
        return FolderFiles(path)
    require_no_pipe(path, DatasetError)
    if path.suffix.lower() == ".npz":
        raise DatasetError(f"{path} is an .npz, which `eval` measures, or measures against, not a data set; {expected}")
    files = ZipFiles(path)
    files.archive  # noqa: B018  # opened now, so that an error appears at once
    return files


def require_readable(path: Path, members: list[Member]) -> None:
    """Raises DatasetError if a member cannot be read, as far as the directory says."""
    for member in members:
        _require(path, member)


def _require(path: Path, member: Member) -> None:
    if member.problem is not None:
        raise DatasetError(f"{path}: {printable(member.name)} {member.problem}; replace or remove it")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def too_large(size: int) -> str | None:
    """Returns Member.problem of a file of so many bytes, if that is too many."""
    return f"takes {size:,} bytes, and at most {MEMBER_BYTES:,} are read" if size > MEMBER_BYTES else None


def _zip_problem(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & 1:
        return "is encrypted, and encrypted files are not read"
    if info.compress_type not in METHODS:
        return f"is compressed by method {info.compress_type}, and only stored and deflated files are read"
    return None


def _other_kind(head: bytes) -> str:
    """Returns what a file that is no zip is, by its first bytes, and what to do."""
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            return f"{kind}; unpack it and give the folder"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and give the folder"
    for magic, kind in _FORMATS.items():
        if head.startswith(magic):
            return f"{kind}; {EXPECTED}"
    return f"{'not a zip' if head else 'an empty file'}; {EXPECTED}"
