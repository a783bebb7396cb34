"""The sources of `data prepare`: archives are read without running or unpacking anything; order and classes."""

import importlib.util
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
    read_document,
    read_images,
    tar_bytes,
    write_folder,
    write_mnist,
    write_zip,
)
from PIL import Image

from edmdistill.data import parquet, tar_files
from edmdistill.data.datasets import open_dataset
from edmdistill.data.prepare import prepare_data
from edmdistill.data.sources import open_pictures
from edmdistill.errors import DatasetError

PICTURES = {f"{folder}/{i}.png": encoded(i, 8, 8) for i, folder in enumerate(("n02012849", "n01440764", "n02012849"))}
SORTED = sorted(PICTURES)
NAMES = ["tench, Tinca tinca", "crane"]


def prepared(source: Path, **options: object) -> tuple[list[np.ndarray], list[int] | None, list[str] | None]:
    """The images, classes and names of the classes of what is made of a source."""
    out = source.parent / "out.zip"
    prepare_data(source, out, overwrite=True, **options)
    document = read_document(out)
    labels = document["labels"]
    if labels is not None:
        assert [name for name, _ in labels] == list(read_images(out))
    return list(read_images(out).values()), labels and [label for _, label in labels], document.get("label_names")


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


def write_parquet(path: Path, rows: dict[str, bytes], labels: list[int] | None, names: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns: dict[str, object] = {"image": [{"bytes": data, "path": name} for name, data in rows.items()]}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = labels
        features["label"] = {"names": names, "_type": "ClassLabel"}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(described if names else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=2)


arrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@arrow
@pytest.mark.parametrize("named", [True, False])
def test_parquet(named: bool, tmp_path: Path) -> None:
    rows = {name: PICTURES[name] for name in SORTED}
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows, [0, 1, 1], NAMES if named else None)
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", {"t": encoded(9, 8, 8)}, [1], NAMES)
    images, labels, names = prepared(tmp_path / "set")
    assert [image.tobytes() for image in images] == [
        np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in rows.values()
    ]
    assert (labels, names) == ([0, 1, 1], NAMES if named else None)
    assert len(prepared(tmp_path / "set", split="test")[0]) == 1
    assert prepared(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", labels="none")[1] is None
    with pytest.raises(DatasetError, match="has no split 'validation'; choose one of test, train"):
        prepared(tmp_path / "set", split="validation")


@arrow
def test_a_parquet_file_without_a_split_has_none(tmp_path: Path) -> None:
    file = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(file, {"t": encoded(9, 8, 8)}, [1], NAMES)
    assert open_pictures(file, tmp_path).kind == "parquet"
    with pytest.raises(DatasetError, match=r"is one set, without splits; leave --split test out"):
        open_pictures(file, tmp_path, split="test")


@arrow
def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"a": encoded(0, 8, 8)}, None, None)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read"):
        prepared(path)


PICTURE = {"bytes": encoded(0, 8, 8), "path": "a.png"}


@arrow
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"image": [PICTURE], "label": [0]}, {"image": [PICTURE]}], r"1\.parquet has other columns than .*0\.parquet"),
        ([{"x": [1]}], "has no column of images, a struct of bytes and path, but x; give a set of pictures"),
        ([{"image": [{"bytes": "text", "path": ""}]}], "has no column of images"),
        ([{"image": [PICTURE, {"bytes": None}]}], r"row 1, cannot be read \(it is empty, or names a file"),
        ([{"image": [PICTURE, None]}], r"row 1, cannot be read \(it is empty, or names a file"),
        ([{"image": [PICTURE] * 2, "label": [0, None]}], "without a class in its column 'label'; --labels none leaves"),
        (
            [{"image": [PICTURE], "label": [10**12]}],
            "class 1,000,000,000,000 in its column 'label', but at most 100,000",
        ),
    ],
    ids=["columns", "none", "text", "empty", "null", "unlabeled", "class"],
)
def test_parquet_that_is_no_data_set(tables: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    """What the sentence advises, no labels, works where it says so."""
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "set").mkdir()
    for number, columns in enumerate(tables):
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "set" / f"{number}.parquet")
    with pytest.raises(DatasetError, match=message) as error:
        prepared(tmp_path / "set")
    if "--labels none" in str(error.value):
        assert prepared(tmp_path / "set", labels="none")[1] is None


@arrow
def test_parquet_of_too_few_names_or_too_large_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", {"a": encoded(0, 8, 8)}, [2], ["cat", "dog"])
    with pytest.raises(DatasetError, match="class 2 in its column 'label', but 2 names; --labels none leaves it out"):
        prepared(tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="whose folders are no classes; leave --labels out"):
        prepared(tmp_path / "a.parquet", labels="folders")
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 8)
    with pytest.raises(DatasetError, match="a group of rows takes more than 8 bytes"):
        prepared(tmp_path / "a.parquet", labels="none")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"pip install 'edmdistill\[parquet\]'"):
        prepared(tmp_path / "a.parquet")


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
