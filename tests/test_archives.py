"""Files of torch.save: read as torch reads them, and what is forged is refused."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edmdistill import archives as module
from edmdistill.archives import Archive, load_legacy
from edmdistill.pickles import Unreadable
from edmdistill.stored_tensors import StoredTensor

SHARED = torch.arange(12.0)
CONTENT = {
    "w": SHARED.reshape(3, 4).t(),
    "view": SHARED[2:5],
    "half": torch.ones(2, 1, dtype=torch.float16),
    "brain": torch.tensor(0.5, dtype=torch.bfloat16),
    "parameter": torch.nn.Parameter(torch.zeros(1)),
    "state": {0: torch.tensor([3, -1]), "lr": 0.1, "none": None},
    "empty": torch.zeros(0, 3),
}


def read(value: object) -> object:
    """The value with its tensors as torch's; an empty one is None."""
    if isinstance(value, dict):
        return {name: read(item) for name, item in value.items()}
    return value.tensor() if isinstance(value, StoredTensor) else value


def assert_content(value: object) -> None:
    found = read(value)
    assert isinstance(found, dict)
    assert found.keys() == CONTENT.keys()
    assert found.pop("empty") is None
    assert found["state"].keys() == CONTENT["state"].keys()
    numbers = found.pop("state").pop(0)
    assert torch.equal(numbers, torch.tensor([3, -1]))
    assert all(found[name].dtype == CONTENT[name].dtype and torch.equal(found[name], CONTENT[name]) for name in found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(CONTENT, tmp_path / "content.pt")
    return tmp_path / "content.pt"


def rewritten(path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """The same members in an archive of Python's."""
    target = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


def load(path: Path) -> object:
    archive = Archive(path)
    try:
        return archive.load("data.pkl", "data", {})
    finally:
        archive.zip.close()


def test_a_zip_reads_as_torch_reads_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed, too; only what is compressed is limited in size."""
    assert_content(load(path))
    assert_content(load(rewritten(path, zipfile.ZIP_DEFLATED)))
    monkeypatch.setattr(module, "MAX_PACKED", 1)
    assert_content(load(path))
    with pytest.raises(Unreadable, match="unfolds to"):
        Archive(rewritten(path, zipfile.ZIP_DEFLATED))


def test_only_so_many_members_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(zipfile.ZipFile(path).namelist())
    monkeypatch.setattr(module, "MAX_MEMBERS", count)
    assert_content(load(path))
    monkeypatch.setattr(module, "MAX_MEMBERS", count - 1)
    with pytest.raises(Unreadable, match=f"a zip archive of {count} members"):
        Archive(path)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (6, 99, "is a zip archive that is cut short or damaged: download it again"),  # the version that it needs
        (8, 1, "is an encrypted zip archive: unpack it with its password and write it by torch.save"),
        (10, 14, "is a zip archive packed by method 14, which torch does not write: give the file as torch.save"),
    ],
    ids=["version", "encrypted", "LZMA"],
)
def test_what_torch_does_not_write_is_refused(path: Path, at: int, value: int, message: str) -> None:
    """As the directory at the end says."""
    content = bytearray(rewritten(path).read_bytes())
    content[content.index(b"PK\1\2") + at] = value
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=message):
        Archive(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK" + bytes(100), "is a zip archive that is cut short or damaged"),
        (pickle.dumps(3), "is not a zip archive, which torch.save writes since 1.6"),
        (b"", "is empty"),
    ],
    ids=["cut", "pickle", "empty"],
)
def test_what_is_no_archive_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=message):
        Archive(path)


@pytest.mark.parametrize(
    "names", [["a/data.pkl", "b/data.pkl"], ["a/data.pkl", "b/x"], ["a/data.pkl", "a/DATA.PKL"], ["data.pkl", "x"], []]
)
def test_an_archive_is_one_folder_of_names_that_differ(names: list[str], tmp_path: Path) -> None:
    """For torch, which takes no notice of case."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps(3, 2))
    with pytest.raises(Unreadable, match=r"is a zip archive of .*, not one that torch\.save or torch\.jit\.save wrote"):
        Archive(tmp_path / "a.pt")


def test_names_are_found_whatever_their_case(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("Top/Data.pkl", pickle.dumps(3, 2))
    for name in ("data.pkl", "DATA.PKL"):
        assert Archive(tmp_path / "a.pt").load(name, "data", {}) == 3
    with pytest.raises(
        Unreadable, match=r"is a zip archive without constants\.pkl: it is damaged, or not a file of torch"
    ):
        Archive(tmp_path / "a.pt").read("constants.pkl")


def test_a_compressed_member_that_is_damaged_is_refused(path: Path) -> None:
    packed = rewritten(path, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(packed) as archive:
        start = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data.pkl"))
    content = bytearray(packed.read_bytes())
    content[start + 50 : start + 90] = bytes(40)
    packed.write_bytes(content)
    with pytest.raises(Unreadable, match=r"holds data\.pkl damaged: download it again"):
        load(packed)


@pytest.mark.parametrize("forge", ["no header", "behind the end", "too long"])
def test_a_member_lies_inside_the_file(path: Path, forge: str) -> None:
    """Where the directory at the end, or what is there, says otherwise."""
    forged = rewritten(path)
    content = bytearray(forged.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the first member
    (name_length,) = struct.unpack_from("<H", content, entry + 28)
    assert content[entry + 46 :][:name_length].endswith(b"/data.pkl")
    if forge == "no header":
        content[2:4] = b"\5\4"
    elif forge == "behind the end":
        struct.pack_into("<I", content, entry + 42, len(content) - 8)
    else:
        struct.pack_into("<I", content, entry + 24, len(content))
    forged.write_bytes(content)
    with pytest.raises(Unreadable, match=r"holds data\.pkl damaged: download it again"):
        load(forged)


@pytest.mark.parametrize("count", [11, 13, 2**40])
def test_a_storage_is_its_member(path: Path, count: int) -> None:
    target = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"K\x0ct" in content
                content = content.replace(b"K\x0ct", pickle.dumps(count, 2)[2:-1] + b"t")
            new.writestr(name, content)
    with pytest.raises(Unreadable, match=f"declares {count:,} float32 numbers where it holds 48 bytes"):
        load(target)


def legacy(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_a_file_before_torch_1_6_reads_as_torch_reads_it() -> None:
    assert_content(load_legacy(memoryview(legacy(CONTENT)), {}))


def change_key(data: bytes) -> bytes:
    """Another key in the list of storages."""
    head, list_, tail = data.rpartition(b"\x80\x02]")
    return head + list_ + tail[:10] + bytes([tail[10] ^ 1]) + tail[11:]


def repeat_key(data: bytes) -> bytes:
    """The one key twice, and the numbers too."""
    head, list_, tail = data.rpartition(b"\x80\x02]")
    key, _, numbers = tail.partition(b"a.")
    return head + list_ + key + b"ah\x01a." + numbers * 2


def with_other_list(data: bytes) -> bytes:
    """A number in place of the list of storages."""
    head, _, _ = data.rpartition(b"\x80\x02]")
    return head + b"K\1."


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (lambda data: data.replace(b"M\xe9\x03.", b"M\xea\x03.", 1), "not a file of torch.save on a little-endian"),
        (lambda data: data[:6] + bytes([data[6] ^ 1]) + data[7:], "not a file of torch.save on a little-endian"),
        (lambda data: data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1), "on a little-endian"),
        (lambda data: data[:-24] + struct.pack("<Q", 5) + data[-16:] + bytes(4), "declares 4 numbers where it holds 5"),
        (lambda data: data[:-1], "ends too early"),
        (lambda data: data.replace(b"Ntq", b"K\x01tq"), "damaged"),  # a view of another storage
        (change_key, "declares other storages"),
        (repeat_key, "declares other storages"),
        (with_other_list, "declares other storages"),
        (lambda data: data[: data.index(b"M\xe9\x03.") + 4] + b"].", "on a little-endian"),
        (lambda data: data.replace(b"K\x04Nt", b"J\xfc\xff\xff\xffNt"), "of -4 numbers"),
    ],
)
def test_a_forged_one_is_refused(forge: Callable[[bytes], bytes], why: str) -> None:
    good: bytes = legacy({"w": torch.arange(4.0)})
    assert isinstance(load_legacy(memoryview(good), {}), dict)
    assert forge(good) != good
    with pytest.raises(Unreadable, match=why):
        load_legacy(memoryview(forge(good)), {})


def test_a_reader_may_know_more_names(tmp_path: Path) -> None:
    program, old, marker = b"\x80\x02ca\nmarker\n.", legacy(0), object()
    with zipfile.ZipFile(tmp_path / "marker.pt", "w") as archive:
        archive.writestr("x/data.pkl", program)
    for names in ({("a", "marker"): marker}, {}):
        for read_it in (
            lambda names: Archive(tmp_path / "marker.pt").load("data.pkl", "data", names),
            lambda names: load_legacy(memoryview(old.replace(b"\x80\x02K\0.", program)), names),
        ):
            if names:
                assert read_it(names) is marker
            else:
                with pytest.raises(Unreadable, match=r"asks for 'a\.marker'"):
                    read_it(names)


@pytest.mark.parametrize("name", ["00000/img00000000.png", "dataset.json"])
def test_a_data_set_is_told_from_a_damaged_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its size, which may be more than any checkpoint has members."""
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.npy", b"x")
        archive.writestr(name, b"x")
    with pytest.raises(Unreadable, match=r"^is a data set and no checkpoint: `edmdistill data inspect` shows it"):
        Archive(tmp_path / "set.zip")
