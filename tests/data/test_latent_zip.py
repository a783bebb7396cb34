"""A zip of latents that grows in place: kills, several writers, and what else may be where it is to be."""

import errno
import fcntl
import json
import os
import stat
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from open_files import open_below
from waiting import LIMIT

from edmdistill.data import latent_zip
from edmdistill.data.latent_zip import LatentZip
from edmdistill.errors import DatasetError

REQUEST = {"images": "a"}
DOCUMENT = {"labels": None, "encoder": {"request": REQUEST}}
MOMENTS = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 2, 2)


def begun(path: Path, *, main: bool = True, overwrite: bool = False) -> LatentZip:
    return LatentZip(path / "set.zip", REQUEST, 3, (2, 2, 2), main=main, overwrite=overwrite)


def test_what_is_put_is_read_and_stays_in_the_zip(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    parts.put([2, 0], MOMENTS[[2, 0]])
    assert (parts.written, parts.missing(range(3)), parts.missing(range(1, 3))) == (2, [1], [1])
    parts.put([1], MOMENTS[1:2])
    assert all(np.array_equal(parts.read(i), MOMENTS[i]) for i in range(3))
    parts.finish(DOCUMENT)
    assert parts.finished
    out = tmp_path / "set.zip"
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o644}  # as unpacked
        assert [np.load(archive.open(info)).tolist() for info in archive.infolist()[:3]] == MOMENTS.tolist()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_zip, "PATIENCE", 0.0)
    parts = begun(tmp_path)
    with pytest.raises(DatasetError, match="another process is writing"):
        begun(tmp_path)
    parts.put(range(3), MOMENTS)
    parts.finish(DOCUMENT)
    assert open_below(tmp_path) == []


def test_an_image_whose_crc_is_zero_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begun(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(latent_zip.zlib, "crc32", lambda data: 0)
        parts.put([0, 1], MOMENTS[:2])
    assert (parts.written, parts.missing(range(3))) == (2, [2])
    parts.close()


def test_what_a_kill_left_of_a_long_directory_is_cut_off(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    parts.put(range(3), MOMENTS)
    with (parts.folder / "latents.zip").open("ab") as file:
        file.write(b"PK\1\2" + bytes(2**17))
    parts.finish(DOCUMENT)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.testzip() is None


def test_parts_that_a_kill_left_beside_the_zip_are_removed(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    parts.put(range(3), MOMENTS)
    parts.finish(DOCUMENT)
    parts.folder.mkdir()
    (parts.folder / "journal").write_bytes(b"")
    assert begun(tmp_path).finished
    assert not parts.folder.exists()


def test_one_process_at_a_time_is_alone(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    with (parts.folder / "lock").open("w") as other:
        with parts.alone(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    parts.close()


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    parts = begun(tmp_path)
    parts.put(range(3), MOMENTS)
    with parts.alone():
        parts.finish(DOCUMENT)
    assert begun(tmp_path).finished


def test_a_process_that_ends_soon_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill of a command whose processes end a moment later."""
    monkeypatch.setattr(latent_zip, "PATIENCE", LIMIT)
    dying = begun(tmp_path)
    threading.Thread(target=lambda: (time.sleep(0.2), dying.close())).start()
    begun(tmp_path).close()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[" * 100_000, '{"encoder": {}}'])
def test_something_else_is_not_replaced(content: str | None, tmp_path: Path) -> None:
    out = tmp_path / "set.zip"
    out.write_bytes(b"text")
    if content is not None:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("dataset.json" if content else "a.png", content)
    before = out.read_bytes()
    with pytest.raises(DatasetError, match=r"already exists and holds something else: .* --overwrite"):
        begun(tmp_path)
    begun(tmp_path, overwrite=True).close()
    assert out.read_bytes() == before  # until the new one is complete


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (json.dumps(REQUEST)[:-2], r"encode\.json is damaged \(.*\): begin .*set\.zip anew with --overwrite"),
        ("[]", r"set\.zip was begun with other images: .* --overwrite"),
    ],
    ids=["torn", "no object"],
)
def test_a_damaged_record_is_kept_unless_it_is_to_be_replaced(record: str, message: str, tmp_path: Path) -> None:
    parts = begun(tmp_path)
    parts.put(range(3), MOMENTS)
    parts.close()
    (parts.folder / "encode.json").write_text(record)
    with pytest.raises(DatasetError, match=message):
        begun(tmp_path)
    again = begun(tmp_path, overwrite=True)
    assert again.missing(range(3)) == [0, 1, 2]
    again.put(range(3), MOMENTS)
    again.finish(DOCUMENT)
    assert begun(tmp_path).finished


@pytest.mark.parametrize("main", [True, False])
def test_overwrite_leaves_what_another_command_is_writing(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_zip, "PATIENCE", 0.0)
    writing = begun(tmp_path)
    writing.put(range(2), MOMENTS[:2])
    with pytest.raises(DatasetError, match="another process is writing"):
        LatentZip(tmp_path / "set.zip", {"images": "b"}, 3, (2, 2, 2), main=main, overwrite=True)
    writing.put([2], MOMENTS[2:])
    writing.finish(DOCUMENT)
    assert begun(tmp_path).finished
    assert open_below(tmp_path) == []


def test_too_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_zip, "MOST", 2)
    with pytest.raises(DatasetError, match="3 images are too many for one set of latents, which holds 2: split it"):
        begun(tmp_path)
    assert not list(tmp_path.iterdir())
