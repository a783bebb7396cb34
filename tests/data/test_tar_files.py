"""The files of a tar: their names, tars in it, and what is too large or gone."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from picture_files import tar_bytes

from edmdistill.data import files as data_files
from edmdistill.data.sources import open_pictures
from edmdistill.data.tar_files import TarFiles, is_tar
from edmdistill.errors import DatasetError


def write(path: Path, members: dict[str, bytes]) -> TarFiles:
    path.write_bytes(tar_bytes(members))
    return TarFiles(path)


def test_names_begin_in_the_tar(tmp_path: Path) -> None:
    files = write(tmp_path / "a.tar", {"./a.png": b"a", "/b.png": b"bb", "c/d.png": b"ccc"})
    assert [(member.name, member.size) for member in files.members()] == [("a.png", 1), ("b.png", 2), ("c/d.png", 3)]
    assert [files.read(name) for name in ("a.png", "b.png", "c/d.png")] == [b"a", b"bb", b"ccc"]


def test_a_tar_in_a_tar_is_a_folder_and_one_in_that_a_file(tmp_path: Path) -> None:
    inner = tar_bytes({"x.png": b"x", "deep.tar": tar_bytes({"y.png": b"y"})})
    files = write(tmp_path / "a.tar", {"one.tar": inner, "TWO.TAR": tar_bytes({"z.png": b"z"})})
    assert [member.name for member in files.members()] == ["one/x.png", "one/deep.tar", "TWO/z.png"]
    assert files.read("TWO/z.png") == b"z"


def test_what_is_too_large_is_said_and_what_is_cut_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "a.tar", {"a.png": b"a", "b.png": b"bb"})
    monkeypatch.setattr(data_files, "MEMBER_BYTES", 1)
    assert [member.problem for member in files.members()] == [None, "takes 2 bytes, and at most 1 are read"]
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1537])
    with pytest.raises(EOFError, match="it ends after 1 of 2 bytes"):
        files.read("b.png")


@pytest.mark.parametrize(
    "data",
    [
        bz2.compress(b"x" * 10**5)[:-30],
        lzma.compress(b"x" * 10**5)[:40],
        b"\xfd7zXZ\0" + bytes(40),
        gzip.compress(b"")[:10] + b"\xff" * 40,
        b"",
    ],
    ids=["bzip2", "xz", "xz header", "gzip", "empty"],
)
def test_a_damaged_archive_is_no_tar(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    assert not is_tar(tmp_path / "a")


def test_a_sparse_file_is_left_out_in_the_newer_format_too(tmp_path: Path) -> None:
    """`tar -S --format=pax` writes the map of the holes before the data, into a regular file."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("GNUSparseFile.0/a.png")
        sparse = {"major": "1", "minor": "0", "name": "a.png", "realsize": "1024"}
        entry.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
        content = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    files = TarFiles(tmp_path / "a.tar")
    assert (files.members(), files.left_out) == ([], {"a.png": "a sparse file"})


def test_a_document_of_a_tar_is_not_read_if_it_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.tar").write_bytes(tar_bytes({"a.png": b"a", "dataset.json": b"{}" + b" " * 2000}))
    monkeypatch.setattr(data_files, "MEMBER_BYTES", 2001)
    with pytest.raises(DatasetError, match=r"dataset\.json takes 2,002 bytes, and at most 2,001 are read; replace or"):
        open_pictures(tmp_path / "set.tar", tmp_path)
