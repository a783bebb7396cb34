"""What claims to be larger than it is, or than anyone needs, is refused by its first header, in little memory."""

import io
import os
import socket
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from picture_files import raw_png, saved
from PIL import Image

from edmdistill.data import datasets
from edmdistill.data.datasets import open_dataset
from edmdistill.data.files import MEMBER_BYTES
from edmdistill.errors import DatasetError
from edmdistill.evaluation.images import open_images

GOOD = saved(Image.new("RGB", (4, 4)))
MEMORY = 2**24
"""Bytes that a refusal may take at most, the smallest of the bombs below being of 2^27."""


def refused(path: Path, message: str, open: object = open_dataset) -> None:
    """Opening a set ends in this one sentence, and took little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=message) as caught:
            open(path)  # type: ignore[operator]
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def png(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG whose header claims a size, with fewer rows."""
    return raw_png(width, height, 8, 2, bytes(rows * (1 + 3 * width)))


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def write(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def changed(path: Path, **fields: int) -> Path:
    """A zip whose directory says other things of its last member."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    local = raw.rindex(b"PK\x03\x04")
    for name, value in fields.items():
        form, in_directory, in_local = {
            "flags": ("<H", 8, 6), "method": ("<H", 10, 8), "crc": ("<I", 16, 14), "packed": ("<I", 20, 18),
            "size": ("<I", 24, 22), "offset": ("<I", 42, None),
        }[name]  # fmt: skip
        struct.pack_into(form, raw, at + in_directory, value)
        if in_local is not None:
            struct.pack_into(form, raw, local + in_local, value)
    path.write_bytes(raw)
    return path


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of an image, and of 200 MB of zeros called 9.png."""
    path = tmp_path_factory.mktemp("bombs") / "zeros.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("0.png", GOOD)
        with archive.open("9.png", "w") as file:
            for _ in range(20):
                file.write(bytes(10**7))
    return path


def test_a_member_of_zeros(zeros: Path, tmp_path: Path) -> None:
    refused(zeros, "9.png takes 200,000,000 bytes, and at most 134,217,728 are read; replace or remove it")
    lie = tmp_path / "lie.zip"
    lie.write_bytes(zeros.read_bytes())
    refused(changed(lie, size=1000), r"9\.png is not a readable image \(Bad CRC-32")


def test_other_members_of_zeros(zeros: Path, tmp_path: Path) -> None:
    raw = zeros.read_bytes()
    (tmp_path / "set.zip").write_bytes(raw.replace(b"9.png", b"9.npy").replace(b"0.png", b"0.txt"))
    refused(tmp_path / "set.zip", r"9\.npy takes 200,000,000 bytes")
    (tmp_path / "x.npz").write_bytes(raw.replace(b"9.png", b"a.npy"))
    refused(tmp_path / "x.npz", "holds .*, but images or arr_0 were expected", lambda path: open_images(path, 0))


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_an_image_of_13000_pixels(form: str, tmp_path: Path) -> None:
    if form == "zip":
        path = write(tmp_path / "set.zip", ("0.png", png(13000, 13000)))
    else:
        path = tmp_path / "set"
        path.mkdir()
        (path / "0.png").write_bytes(png(13000, 13000))
    refused(path, r"0\.png is 13000x13000, larger than 4096 pixels a side; resize it")
    refused(path, r"0\.png is 13000x13000", lambda path: open_images(path, 0))


def test_an_image_of_more_than_pillow_opens(tmp_path: Path) -> None:
    refused(write(tmp_path / "set.zip", ("0.png", png(2**31 - 1, 2**31 - 1, 0))), r"0\.png is not a readable image \(")
    refused(write(tmp_path / "b.zip", ("0.png", GOOD), ("1.png", png(4097, 1))), r"1\.png is 4097x1, larger than")


CLAIMS = {
    "8 TiB": ("{'descr': '<f4', 'fortran_order': False, 'shape': (8, 524288, 524288)}", "its header claims 8,796,0"),
    "overflow": ("{'descr': '<f4', 'fortran_order': False, 'shape': (8, 2**40)}", "not a readable array"),
    "many zeros": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 4611686018427387904, 4)}",
        "claims 590,295,8",
    ),
    "negative": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-8, 4, 4)}", r"shape \[-8, 4, 4\]"),
    "objects": ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "Object arrays cannot be read"),
    "large items": ("{'descr': '<U1000000', 'fortran_order': False, 'shape': (1,)}", "claims 4,000,000 bytes"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_arrays_that_claim_too_much(what: str, tmp_path: Path) -> None:
    header, message = CLAIMS[what]
    data = npy(header)
    refused(write(tmp_path / "set.zip", ("0.npy", data)), message)
    for name, member in (("x.npz", "images.npy"), ("y.npz", "arr_0.npy")):
        refused(write(tmp_path / name, (member, data)), message, lambda path: open_images(path, 0))
    (tmp_path / "x.npy").write_bytes(data)
    refused(tmp_path / "x.npy", message, lambda path: open_images(path, 0))


def test_an_npz_whose_directory_claims_what_its_header_claims(tmp_path: Path) -> None:
    """Nothing is allocated by claims: the images are read a batch at a time, and the first is not there."""
    data = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (64000, 256, 256, 1)}", bytes(1000))
    path = changed(write(tmp_path / "x.npz", ("images.npy", data)), size=128 + 64000 * 2**16)
    images = open_images(path, 0)
    assert images.count == 64000
    refused(path, "images cannot be read to its end", lambda path: images.read(range(16)))


def test_images_are_read_in_batches(tmp_path: Path) -> None:
    """2^27 bytes of images, deflated to an eighth of a megabyte, in a few megabytes of memory."""
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w") as file,
    ):
        file.write(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2048, 256, 256, 1)}"))
        for _ in range(8):
            file.write(bytes(2**24))
    tracemalloc.start()
    images = open_images(tmp_path / "x.npz", 0)
    for start in range(0, 2048, 64):
        assert images.read(range(start, start + 64)).shape == (64, 1, 256, 256)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": 1}, r"1\.png is encrypted, and encrypted files are not read; replace or remove it"),
        ({"method": 9}, r"1\.png is compressed by method 9, and only stored and deflated files are read"),
        ({"method": 12}, r"1\.png is compressed by method 12"),
        ({"method": 14}, r"1\.png is compressed by method 14"),
        ({"size": 2**32 - 2}, r"1\.png takes 4,294,967,294 bytes"),
        ({"size": 10**6}, r"1\.png is not a readable image"),
        ({"crc": 1}, r"1\.png is not a readable image \(Bad CRC-32"),
        ({"offset": 2**31}, r"not a whole zip|1\.png is not a readable image"),
    ],
)
def test_members_of_zips_that_cannot_be_read(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", ("0.png", GOOD), ("1.png", GOOD))
    refused(changed(path, **fields), message)


@pytest.mark.parametrize("fields", [{"flags": 1}, {"method": 12}, {"size": 2**32 - 2}], ids=str)
def test_what_the_directory_says_is_refused_when_a_large_set_is_opened(
    fields: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)  # images are read when they are wanted
    path = write(tmp_path / "set.zip", ("0.png", GOOD), ("1.png", GOOD))
    refused(changed(path, **fields), r"1\.png .*; replace or remove it")


def test_a_file_of_a_folder_that_is_too_large_is_refused_when_a_large_set_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    for name, size in {"0.png": 0, "1.png": MEMBER_BYTES}.items():
        (tmp_path / name).write_bytes(GOOD)
        os.truncate(tmp_path / name, len(GOOD) + size)  # a hole
    refused(tmp_path, r"1\.png takes 134,[0-9,]* bytes, and at most 134,217,728 are read; replace or remove it")


def test_paths_in_a_zip_lead_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", ("../../0.png", GOOD), ("/etc/1.png", GOOD), ("a\x1b[2J.png", GOOD))
    data = open_dataset(path)
    assert data.files == ["../../0.png", "/etc/1.png", "a\\x1b[2J.png"]
    assert data.images(range(3)).shape == (3, 3, 4, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.zip"]


def test_what_is_no_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would wait for ever for someone to write to it."""
    os.mkfifo(tmp_path / "pipe.zip")
    refused(tmp_path / "pipe.zip", r"pipe\.zip is a pipe or a device: write its contents to a file")
    refused(Path("/dev/zero"), "/dev/zero is a pipe or a device")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path may be 108 bytes long
        server.bind("s.zip")
    refused(tmp_path / "s.zip", "is a pipe or a device")
    for name, make, message in (
        ("pipes", lambda path: os.mkfifo(path), r"1\.png is a named pipe and not a file; replace or remove it"),
        ("devices", lambda path: path.symlink_to("/dev/zero"), r"1\.png is a device and not a file"),
        ("broken", lambda path: path.symlink_to("nowhere"), r"1\.png is a broken link"),
        ("itself", lambda path: path.symlink_to("1.png"), r"1\.png is a broken link"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(GOOD)
        make(tmp_path / name / "1.png")
        refused(tmp_path / name, message)


def test_links(tmp_path: Path) -> None:
    """Links are followed, once: a loop, or a folder by two names, is refused."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(GOOD)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "set").files == ["link/1.png"]
    (tmp_path / "set" / "again").symlink_to("link")
    refused(
        tmp_path / "set",
        r"link and again are the same folder through a link|again and link are the same folder through a link",
    )
    (tmp_path / "set" / "again").unlink()
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    refused(
        tmp_path / "set",
        r"\. and link/loop are the same folder through a link, so its images would count twice; remove",
    )
    (tmp_path / "elsewhere" / "loop").unlink()
    (tmp_path / "set" / "disk").symlink_to("/no/such/disk")  # perhaps a folder of pictures
    assert open_dataset(tmp_path / "set").notes == [f"{tmp_path}/set: left out 1 file: a broken link (disk)."]
    (tmp_path / "round.zip").symlink_to("round.zip")
    refused(tmp_path / "round.zip", r"round\.zip cannot be opened \(Too many levels of symbolic links\)")


def test_a_folder_too_deep_to_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path reaches what is in it, so it is not passed over as a file that is no image."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path / "set")
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("1.png").write_bytes(GOOD)
    refused(tmp_path / "set", r"\.\.\.[d/]+ cannot be listed \(File name too long\); move or remove it$")


@pytest.mark.parametrize(
    ("name", "message"), [("a\0b", r"a\\x00b cannot be opened"), ("a" * 300, "File name too long")]
)
def test_names_that_no_system_takes(name: str, message: str) -> None:
    refused(Path(name), message)


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(
        DatasetError, match="the name of the data set is empty; give a zip, a folder, or the word digits"
    ):
        open_dataset("")


def test_the_largest_image_is_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((4096, 4096), np.uint8)).save(out, "png", compress_level=1)
    assert open_dataset(write(tmp_path / "set.zip", ("0.png", out.getvalue()))).img_resolution == 4096
