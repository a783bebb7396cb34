"""The sources of `data prepare`: archives are read without running or unpacking anything; order and classes."""

import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from picture_files import (
    cifar10,
    encoded,
    prepared,
    read_images,
    tar_bytes,
    write_folder,
    write_mnist,
    write_zip,
)
from PIL import Image

from edmdistill.data import sources, tar_files
from edmdistill.data.datasets import open_dataset
from edmdistill.data.prepare import prepare_data
from edmdistill.data.sources import open_pictures
from edmdistill.errors import DatasetError

PICTURES = {f"{folder}/{i}.png": encoded(i, 8, 8) for i, folder in enumerate(("n02012849", "n01440764", "n02012849"))}
SORTED = sorted(PICTURES)
NAMES = ["tench, Tinca tinca", "crane"]


def assert_pictures(source: Path, classes: list[int] | None = [0, 1, 1], **options: object) -> None:  # noqa: B006
    images, found, names = prepared(source, **options)
    for image, name in zip(images, SORTED, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(PICTURES[name]))))
    assert (found, names) == (classes, NAMES if classes else None)


def test_folders_are_classes_named_by_their_synsets(tmp_path: Path) -> None:
    assert_pictures(write_folder(tmp_path / "set", PICTURES))
    assert_pictures(write_folder(tmp_path / "set", PICTURES), None, labels="none")


def test_a_zip_has_no_classes_without_a_document_unless_they_are_asked_for(tmp_path: Path) -> None:
    """As in the official tool."""
    source = write_zip(tmp_path / "set.zip", PICTURES)
    assert_pictures(source, None)
    assert "--labels folders" in prepare_data(source, tmp_path / "out.zip", overwrite=True).notes[0]
    assert_pictures(source, labels="folders")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_a_folder(mode: str, tmp_path: Path) -> None:
    source = tmp_path / "set.tar"
    source.write_bytes(tar_bytes({f"./{name}": data for name, data in PICTURES.items()}, mode))
    assert_pictures(source)


def test_tars_in_a_tar_are_its_folders(tmp_path: Path) -> None:
    """As in ImageNet's ILSVRC2012_img_train.tar."""
    folders = sorted({name.partition("/")[0] for name in PICTURES}, reverse=True)
    inner = {
        f"{folder}.tar": tar_bytes({n.partition("/")[2]: d for n, d in PICTURES.items() if n.startswith(folder)})
        for folder in folders
    }
    (tmp_path / "set.tar").write_bytes(tar_bytes(inner))
    assert_pictures(tmp_path / "set.tar")


def test_files_in_no_folder_are_a_class_of_their_own(tmp_path: Path) -> None:
    """As in the official tool."""
    source = write_folder(tmp_path / "set", {"z.png": encoded(0, 8, 8), "a/y.png": encoded(1, 8, 8)})
    assert prepared(source)[1:] == ([1, 0], ["(no folder)", "a"])
    assert (
        "what is in no folder is class 0: 1 picture"
        in prepare_data(source, tmp_path / "out.zip", overwrite=True).notes[0]
    )
    assert prepared(write_folder(tmp_path / "flat", {"z.png": encoded(0, 8, 8)}))[1] is None


def test_classes_that_are_a_folder_deeper_are_pointed_out(tmp_path: Path) -> None:
    """As in the official tool, the top folders are the classes; often there is only one, as train."""
    source = write_folder(tmp_path / "set", {f"train/{name}/a.png": encoded(0, 8, 8) for name in ("cat", "dog")})
    note = "all pictures are in one folder, train, so they have no classes; prepare that folder, and its 2 folders are"
    assert prepare_data(source, tmp_path / "out.zip").notes[0].startswith(note)
    assert prepared(source)[1] is None
    assert prepared(source / "train")[1:] == ([0, 1], ["cat", "dog"])


@pytest.mark.parametrize("labels", [None, []])
def test_a_description_without_labels_is_none(labels: list[object] | None, tmp_path: Path) -> None:
    """As in the official tool."""
    document = {"dataset.json": json.dumps({"labels": labels}).encode()}
    assert_pictures(write_folder(tmp_path / "set", PICTURES | document))
    assert_pictures(write_zip(tmp_path / "set.zip", PICTURES | document), None)


def test_numbered_folders_may_be_no_classes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", {f"0000{i}/img.png": encoded(i, 8, 8) for i in range(2)})
    assert prepared(source)[1] == [0, 1]
    assert "may only be numbered; --labels none" in prepare_data(source, tmp_path / "out.zip", overwrite=True).notes[0]


def test_what_only_some_pictures_have_is_no_class(tmp_path: Path) -> None:
    document = {"dataset.json": json.dumps({"labels": [[SORTED[0], 0]]}).encode()}
    source = write_folder(tmp_path / "set", PICTURES | document)
    with pytest.raises(DatasetError, match="has no label for 2 of 3 images"):
        prepared(source)
    assert_pictures(source, None, labels="none")
    assert prepared(source, max_images=1)[1] == [0]  # as the official tool, which reads no more
    with pytest.raises(DatasetError, match="has no label for 1 of 2 images"):
        prepared(source, max_images=2)


def test_the_names_of_a_document_are_kept(tmp_path: Path) -> None:
    document = {"labels": [[name, i] for i, name in enumerate(SORTED)], "label_names": ["x", "y", "z", "none"]}
    source = write_zip(tmp_path / "set.zip", PICTURES | {"dataset.json": json.dumps(document).encode()})
    assert prepared(source)[1:] == ([0, 1, 2], document["label_names"])


@pytest.mark.parametrize(
    "protocol", [0, 2, 3, 4, 5], ids=lambda protocol: f"protocol {protocol}" if protocol else "py2"
)
def test_cifar10s_pickles_are_read_as_data(protocol: int, tmp_path: Path) -> None:
    members, images, labels = cifar10(4, protocol)
    source = tmp_path / "cifar-10-python.tar.gz"
    source.write_bytes(tar_bytes(members, "w:gz"))
    found, classes, names = prepared(source)
    assert np.array_equal(found, images)
    assert classes == labels
    assert names is not None
    assert (names[0], len(names)) == ("airplane", 10)
    assert len(prepared(source, split="test")[0]) == 4


def test_cifar10_in_a_folder_and_as_binary(tmp_path: Path) -> None:
    members, images, labels = cifar10(2, 4)
    assert np.array_equal(prepared(write_folder(tmp_path / "set", members))[0], images)
    rows = images.transpose(0, 3, 1, 2).reshape(5, 2, 3072)
    binary = {
        f"cifar-10-batches-bin/data_batch_{i + 1}.bin": b"".join(
            bytes([label]) + row.tobytes() for label, row in zip(labels[2 * i : 2 * i + 2], rows[i], strict=True)
        )
        for i in range(5)
    }
    (tmp_path / "bin.tar").write_bytes(tar_bytes(binary))
    found, classes, _ = prepared(tmp_path / "bin.tar")
    assert np.array_equal(found, images)
    assert classes == labels


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"cos\nsystem\n(S'touch PWNED'\ntR.", r"data_batch_3 asks for 'os\.system'.*nothing was executed"),
        (b"\x80\x04}.", "data_batch_3 does not hold data and labels; download CIFAR-10 again"),
        (b"\x80\x04ss", r"data_batch_3 is damaged, or no official pickle \(byte 3\); download CIFAR-10 again$"),
        (b"", "data_batch_3 ends too early"),
        (
            pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}),
            r"data_batch_3 holds uint8 \[2, 3071\] for 2 labels; download CIFAR-10 again",
        ),
        (
            b"\x80\x02c_codecs\nencode\nq\0X"
            + struct.pack("<I", 2**20)
            + b"x" * 2**20
            + b"q\1X\6\0\0\0latin1\x86q\2R"
            + b"h\0h\2R" * 9
            + b".",
            "data_batch_3 unfolds to more than",
        ),
    ],
)
def test_a_batch_that_is_none(batch: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members = cifar10(2, 4)[0] | {"cifar-10-batches-py/data_batch_3": batch}
    (tmp_path / "set.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DatasetError, match=message) as caught:
        prepared(tmp_path / "set.tar")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_mnist_is_padded_and_stays_gray(suffix: str, tmp_path: Path) -> None:
    """As in EDM's tool."""
    rng = np.random.default_rng(0)
    digits, classes = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), rng.integers(0, 10, 5, dtype=np.uint8)
    source = write_mnist(tmp_path / "mnist", digits, classes, suffix)
    images, labels, names = prepared(source)
    assert np.array_equal(images, np.pad(digits, [(0, 0), (2, 2), (2, 2)]))
    assert (labels, names) == (classes.tolist(), list("0123456789"))
    colored, _, _ = prepared(source, resolution=32, transform="center-crop")
    assert np.array_equal(colored, np.repeat(np.asarray(images)[..., None], 3, axis=3))


def test_broken_mnist(tmp_path: Path) -> None:
    digits = np.zeros((5, 28, 28), np.uint8)
    source = write_mnist(tmp_path / "mnist", digits, np.zeros(4, np.uint8))
    with pytest.raises(DatasetError, match=r"labels 4 images, but .* holds 5"):
        prepared(source)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="is not a whole file of MNIST's format"):
        prepared(source)
    raw = tmp_path / "mnist" / "train-images-idx3-ubyte"
    raw.write_bytes(struct.pack(">4I", 0x803, 2**31, 28, 28))
    with pytest.raises(DatasetError, match=r"it begins with 0x803 and \[2147483648, 28, 28\]"):
        prepared(raw)


def test_what_is_no_file_in_a_tar_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "set.tar"
    with tarfile.open(source, "w") as archive:
        for name, kind in (("a.png", tarfile.FIFOTYPE), ("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        for name in ("../../d.png", "/e.png", "\udcff.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(encoded(0, 8, 8))
            archive.addfile(entry, io.BytesIO(encoded(0, 8, 8)))
    left_out = prepare_data(source, tmp_path / "out.zip").record["left_out"]
    assert left_out == {"a named pipe": 1, "a link": 2}
    assert len(read_images(tmp_path / "out.zip")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set.tar"]


def corrupted(data: bytes, name: bytes) -> bytes:
    at = data.index(name)
    return data[: at + 150] + b"\xff" + data[at + 151 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_bytes(PICTURES)[:1200], "is not a whole tar"),
        (tar_bytes(PICTURES)[: -2 * 512 - 8192], "is not a whole tar"),
        (corrupted(tar_bytes(PICTURES), b"n01440764/1.png"), "is not a whole tar .*no end mark"),
        (tar_bytes({"a.tar": tar_bytes(PICTURES)[:600], "b.png": encoded(0, 8, 8)}), "is not a whole tar"),
        (tar_bytes(PICTURES, "w:gz")[:-400], "is damaged"),
        (tar_bytes({"readme": b"x"}), r"holds no pictures \(left out: not an image \(readme\)\)"),
        (b"hello", "is none of the sources that are read; give a folder, a zip or a tar"),
    ],
)
def test_broken_archives(data: bytes, message: str, tmp_path: Path) -> None:
    source = tmp_path / "set.tar"
    source.write_bytes(data)
    with pytest.raises(DatasetError, match=message) as caught:
        prepared(source)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar"]


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_reading_an_archive_shows_how_far_it_is(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "set.tar"
    source.write_bytes(tar_bytes(PICTURES, kind))
    passed: list[int] = []
    prepare_data(source, tmp_path / "out.zip", on_bytes=passed.append)
    assert min(passed) > 0
    end = source.stat().st_size
    assert end - 10240 <= sum(passed) <= end  # a plain one ends with empty blocks


def test_a_tar_with_a_name_twice(tmp_path: Path) -> None:
    source = tmp_path / "set.tar"
    with tarfile.open(source, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DatasetError, match=r"holds a\.png twice"):
        prepared(source)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "set.tar.gz"
    source.write_bytes(tar_bytes({"a.png": bytes(2**22)}, "w:gz"))
    monkeypatch.setattr(tar_files, "_BLOCK", 2**16)
    with pytest.raises(DatasetError, match="unfolds to more than 200 times its size"):
        prepared(source)


def test_a_source_that_cannot_be_reached_is_not_said_to_be_absent(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DatasetError, match=r"loop cannot be opened \(Too many levels of symbolic links\); give a"):
        prepared(tmp_path / "loop")


def test_options_that_a_source_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere does not exist; give a folder"):
        prepared(tmp_path / "nowhere")
    source = write_folder(tmp_path / "set", PICTURES)
    with pytest.raises(DatasetError, match="is one set, without splits; leave --split test out"):
        prepared(source, split="test")
    with pytest.raises(DatasetError, match="did you mean 'folders'"):
        prepared(source, labels="folder")
    (tmp_path / "cifar.tar").write_bytes(tar_bytes(cifar10(1, 4)[0]))
    with pytest.raises(DatasetError, match="leave --labels out"):
        prepared(tmp_path / "cifar.tar", labels="folders")
    with pytest.raises(DatasetError, match="CIFAR-10 has no split 'validation'; choose one of train, test"):
        prepared(tmp_path / "cifar.tar", split="validation")
    members = {name: data for name, data in cifar10(1, 4)[0].items() if "test" not in name}
    (tmp_path / "cifar.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DatasetError, match="has no test_batch; download it again"):
        prepared(tmp_path / "cifar.tar", split="test")
    (tmp_path / "binary.tar").write_bytes(tar_bytes({f"data_batch_{i}.bin": bytes(3074) for i in range(1, 6)}))
    with pytest.raises(DatasetError, match="takes 3,074 bytes, which is no multiple of 3,073; download CIFAR-10 again"):
        prepared(tmp_path / "binary.tar")
    members = {f"data_batch_{i}.bin": b"\x0a" + bytes(3072) for i in range(1, 6)}
    (tmp_path / "binary.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DatasetError, match="has labels from 10 to 10, not 0 to 9; download CIFAR-10 again"):
        prepared(tmp_path / "binary.tar")
    mnist = write_mnist(tmp_path / "mnist", np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8))
    with pytest.raises(DatasetError, match="has no folders, from which --labels folders would take classes; leave it"):
        prepared(mnist, labels="folders")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/set"
    for name in (b"a\xff", b"line\nbreak"):
        os.makedirs(folder + b"/" + name)
        Path(os.fsdecode(folder + b"/" + name)).joinpath("x.png").write_bytes(encoded(0, 8, 8))
    assert prepared(tmp_path / "set")[1:] == ([0, 1], [r"a\udcff", r"line\nbreak"])
    assert open_dataset(tmp_path / "out.zip").label_dim == 2


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DatasetError, match=r"pipe\.tar is a pipe or a device: write its contents to a file"):
        open_pictures(tmp_path / "pipe.tar", tmp_path)


def test_a_source_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "set", PICTURES)
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)  # for root all may
    with pytest.raises(DatasetError, match="set may not be read by this user; change its permissions"):
        open_pictures(source, tmp_path)


def test_a_document_that_labels_what_is_not_there_is_noted(tmp_path: Path) -> None:
    """Beside pictures that --max-images leaves out, which are there, and files that are left out."""
    names = [*SORTED, "gone/1.png", "gone/2.png", "notes.txt"]
    document = {"dataset.json": json.dumps({"labels": [[name, 0] for name in names]}).encode(), "notes.txt": b"x"}
    for source in (
        write_folder(tmp_path / "set", PICTURES | document),
        write_zip(tmp_path / "s.zip", PICTURES | document),
    ):
        for most in (None, 1):
            assert open_pictures(source, tmp_path, most=most).notes == [
                "dataset.json labels 2 files that are not there, the first gone/1.png"
            ]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_only_the_document_at_the_top_has_classes(form: str, tmp_path: Path) -> None:
    """In the official tool; a file of that name elsewhere is no picture."""
    inner = {"n01440764/dataset.json": json.dumps({"labels": [["1.png", 5]]}).encode()}
    write = write_folder if form == "folder" else write_zip
    found = open_pictures(write(tmp_path / "set", PICTURES | inner), tmp_path)
    assert (None if found.labels is None else found.labels.tolist()) == ([0, 1, 1] if form == "folder" else None)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_source_knows_when_the_last_of_its_files_was_changed(form: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", PICTURES)
    last = max((source / name for name in PICTURES), key=lambda path: path.stat().st_ctime_ns)
    if form == "file":
        source = last = write_zip(tmp_path / "set.zip", PICTURES)
    assert open_pictures(source, tmp_path).changed == last.stat().st_ctime_ns
    os.chmod(last, 0o600)
    assert open_pictures(source, tmp_path).changed == last.stat().st_ctime_ns


def test_a_damaged_document_of_a_zip_is_refused(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "set.zip", PICTURES | {"dataset.json": b"{}"})
    content = bytearray(source.read_bytes())
    entry = content.index(b"PK\1\2", content.rindex(b"dataset.json") - 60)
    content[entry + 8] |= 1  # encrypted, says the directory
    source.write_bytes(content)
    with pytest.raises(DatasetError, match=r"dataset\.json is encrypted, and encrypted files are not read"):
        open_pictures(source, tmp_path)


def test_numbered_folders_of_a_zip_are_not_offered_as_classes(tmp_path: Path) -> None:
    """As those of every set in EDM's layout."""
    numbered = {f"0000{i}/img0000000{i}.png": PICTURES[name] for i, name in enumerate(SORTED)}
    assert open_pictures(write_zip(tmp_path / "a.zip", numbered), tmp_path).notes == []
    (note,) = open_pictures(write_zip(tmp_path / "b.zip", PICTURES), tmp_path).notes
    assert "--labels folders makes its 2 top folders classes" in note
