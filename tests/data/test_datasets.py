"""Data sets: the digits, EDM's zips and folders, broken sources in one sentence."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from edmdistill.data import datasets
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import DatasetError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
FILES = {f"0000{i % 2}/img{i}.png": PIXELS[i] for i in range(5)}
LABELS = [[name, i % 3] for i, name in enumerate(FILES)]

Members = dict[str, bytes]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members(labels: object = LABELS, **changes: bytes) -> Members:
    """A good data set of five 4x4 images in two folders, with changes."""
    described = json.dumps({"labels": labels}).encode()
    return {name: png(p) for name, p in FILES.items()} | {"dataset.json": described} | changes


def write_zip(path: Path, content: Members) -> Path:
    with zipfile.ZipFile(path / "set.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path / "set.zip"


def write_folder(path: Path, content: Members) -> Path:
    for name, data in content.items():
        target = path / "set" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path / "set"


both = pytest.mark.parametrize("write", [write_zip, write_folder])
Write = Callable[[Path, Members], Path]


def test_digits_are_the_real_ones() -> None:
    data = open_dataset("digits", split="all")
    assert (len(data), data.img_channels, data.img_resolution, data.label_dim) == (1797, 1, 8, 10)
    assert data.label_names == list("0123456789")
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    images = data.images(range(1797))
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy().reshape(1797, 64), np.round(values * 255 / 16))
    assert data.labels(range(1797)).tolist() == classes.tolist()


def test_digits_splits_are_fixed_and_disjoint() -> None:
    train, test, everything = (open_dataset("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test)) == (1500, 297)
    assert set(train.files).isdisjoint(test.files)
    assert set(train.files) | set(test.files) == set(everything.files)
    assert test.files[:4] == ["digit 5", "digit 9", "digit 12", "digit 16"]
    assert len(open_dataset("digits")) == 1500
    numbers = [int(name.removeprefix("digit ")) for name in test.files]
    assert test.labels(range(297)).tolist() == everything.labels(numbers).tolist()
    assert torch.equal(test.images(range(297)), everything.images(numbers))
    mirrored = open_dataset("digits", split="test", xflip=True)
    assert torch.equal(mirrored.images([297, 593]), test.images([0, 296]).flip(3))
    assert mirrored.labels([297, 593]).tolist() == test.labels([0, 296]).tolist()


def test_a_file_called_like_an_embedded_set_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    data = open_dataset("digits")
    assert (len(data), data.notes) == (1500, ["digits is the embedded data set; what has that name here is ./digits."])


@both
@pytest.mark.parametrize("in_memory", [True, False])
def test_edm_layout(write: Write, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 2**28 if in_memory else 0)
    data = open_dataset(write(tmp_path, members()))
    order = sorted(range(5), key=list(FILES).__getitem__)
    assert (len(data), data.img_channels, data.img_resolution, data.label_dim) == (5, 3, 4, 3)
    assert data.label_names is None
    for i, original in enumerate(order):
        assert np.array_equal(data.images([i])[0].numpy(), PIXELS[original].transpose(2, 0, 1))
        assert int(data.labels([i])) == original % 3
    x0, labels = data.tensors(torch.tensor([3, 0]))
    assert torch.equal(x0, data.images([3, 0]) / 127.5 - 1)
    assert x0.dtype == torch.float32
    assert labels is not None
    assert labels.tolist() == torch.eye(3)[data.labels([3, 0])].tolist()


@both
@pytest.mark.parametrize("labels", [None, "absent"])
def test_labels_are_optional(write: Write, labels: str | None, tmp_path: Path) -> None:
    content = members(None)
    if labels == "absent":
        del content["dataset.json"]
    data = open_dataset(write(tmp_path, content))
    assert data.label_dim == 0
    assert data.tensors([0])[1] is None
    assert data.labels([0]) is None


def test_grayscale(tmp_path: Path) -> None:
    data = open_dataset(write_zip(tmp_path, {"a.png": png(PIXELS[0, :, :, 0])}))
    assert data.img_channels == 1
    assert np.array_equal(data.images([0])[0].numpy()[0], PIXELS[0, :, :, 0])


@pytest.mark.parametrize("in_memory", [True, False])
@both
def test_mirrored_images_follow_the_others(
    write: Write, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 2**28 if in_memory else 0)
    source = write(tmp_path, members())
    plain, data = open_dataset(source), open_dataset(source, xflip=True)
    images = plain.images(range(5))
    assert (len(data), data.label_dim) == (10, 3)
    assert torch.equal(data.images(range(10)), torch.cat([images, images.flip(3)]))
    assert torch.equal(data.images([7, 2]), torch.stack([images[2].flip(2), images[2]]))
    assert data.labels(range(10)).tolist() == 2 * plain.labels(range(5)).tolist()
    assert data.class_counts == plain.class_counts == [2, 2, 1]
    assert (data.labels_sha256, data.content_sha256) == (plain.labels_sha256, plain.content_sha256)
    with pytest.raises(IndexError):
        plain.images([5])


def test_a_large_set_is_read_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small one every image is read when it is opened, so that a broken one is found then."""
    source = write_folder(tmp_path, members(None, **{"z.png": b"broken"}))
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 6 * PIXELS[0].nbytes - 1)
    data = open_dataset(source)
    assert data.images(range(5)).shape == (5, 3, 4, 4)
    with pytest.raises(DatasetError, match=r"z\.png is not a readable image"):
        data.images([5])
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 6 * PIXELS[0].nbytes)
    with pytest.raises(DatasetError, match=r"z\.png is not a readable image"):
        open_dataset(source)


@pytest.mark.parametrize(
    ("labels", "names", "from_one"),
    [([1, 2, 1, 2, 1], None, True), ([1, 3, 1, 3, 1], None, False), ([0, 2, 0, 2, 0], None, False),
     ([1, 2, 1, 2, 1], ["a", "b", "c"], False)],
)  # fmt: skip
def test_labels_that_begin_at_one_are_all_from_1_to_k(
    labels: list[int], names: list[str] | None, from_one: bool, tmp_path: Path
) -> None:
    described = json.dumps({"labels": [*zip(FILES, labels, strict=True)], "label_names": names}).encode()
    data = open_dataset(write_zip(tmp_path, members(**{"dataset.json": described})))
    assert [" (the labels begin at 1, " in note for note in data.notes] == [from_one]


def test_the_digest_of_images_in_memory_is_of_all() -> None:
    changed = PIXELS.copy()
    changed[4, 0, 0, 0] ^= 1
    one, same, other = (
        Dataset("set", "train", [*FILES], p.transpose(0, 3, 1, 2).__getitem__) for p in (PIXELS, PIXELS, changed)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_which_images_exif_would_turn_is_known(tmp_path: Path) -> None:
    exif, out = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(PIXELS[0]).save(out, "png", exif=exif)
    names = sorted(FILES)
    data = open_dataset(write_zip(tmp_path, members(**{names[1]: out.getvalue(), names[3]: out.getvalue()})))
    assert data.turned == {1, 3}


MOMENTS = np.random.default_rng(1).random((5, 4, 6, 6), dtype=np.float32)
LATENTS = {f"00000/img-mean-std-{i:08}.npy": npy(MOMENTS[i]) for i in range(5)}


@both
def test_latents(write: Write, tmp_path: Path) -> None:
    described = json.dumps({"labels": [[name, i] for i, name in enumerate(LATENTS)]}).encode()
    source = write(tmp_path, LATENTS | {"dataset.json": described})
    data = open_dataset(source)
    assert (data.latent, len(data), data.img_channels, data.img_resolution, data.label_dim) == (True, 5, 2, 6, 5)
    assert data.encoding is None  # EDM2's VAE has four channels
    moments, labels = data.tensors([4, 0])
    assert np.array_equal(moments.numpy(), MOMENTS[[4, 0]])
    assert labels is not None
    assert labels.tolist() == torch.eye(5)[[4, 0]].tolist()
    with pytest.raises(DatasetError, match="holds latents, but pixels are needed"):
        data.images([0])
    with pytest.raises(DatasetError, match=r"holds latents.*mirrored.*leave data\.xflip out"):
        open_dataset(source, xflip=True)


@pytest.mark.parametrize("content", [members(), LATENTS], ids=["images", "latents"])
@both
def test_a_copy_in_another_process_opens_its_own_file(
    write: Write, content: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    data = open_dataset(write(tmp_path, content))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.tensors(range(5))[0], data.tensors(range(5))[0])
    if write is write_zip:
        ours, its = (set_._read.files.archive.fp for set_ in (data, copy))
        assert ours.fileno() != its.fileno()


BAD: dict[str, tuple[Members, str]] = {
    "empty": ({"readme.txt": b"x"}, "holds no images"),
    "mixed sizes": (members(**{"z.png": png(PIXELS[0, :3, :3])}), r"z\.png is 3x3 with 3 channels, but .* is 4x4"),
    "mixed channels": (members(None, **{"z.png": png(PIXELS[0, :, :, 0])}), r"z\.png is 4x4 with 1 channel, but"),
    "not square": ({"a.png": png(PIXELS[0, :3])}, r"a\.png is 4x3 with 3 channels, but images must be square"),
    "corrupt": (members(None, **{"z.png": png(PIXELS[0])[:50]}), r"z\.png is not a readable image"),
    "not an image": (members(None, **{"z.png": b"hello"}), r"z\.png is not a readable image"),
    "alpha": ({"a.png": png(np.zeros((4, 4, 4), np.uint8))}, r"a\.png has mode RGBA \(transparency\); convert"),
    "images and latents": (members(None, **{"z.npy": npy(MOMENTS[0])}), r"1 latent, the first z\.npy, among 6 files"),
    "corrupt latents": (LATENTS | {"z.npy": npy(MOMENTS[0])[:200]}, r"z\.npy is not a readable array"),
    "pickled latents": ({"a.npy": npy(np.array([{}]))}, r"a\.npy is not a readable array \(Object arrays cannot be"),
    "endless latents": (
        {"a.npy": npy(MOMENTS[0]).replace(b"(4, 6, 6), }     ", b"(4000, 60000, 60000), }")},
        r"a\.npy is not a readable array",
    ),
    "double latents": (
        {"a.npy": npy(MOMENTS[0].astype(float))},
        r"a\.npy is float64 \[4, 6, 6\], but latents are float32",
    ),
    "no deviations": (
        {"a.npy": npy(MOMENTS[0, :3])},
        r"a\.npy is float32 \[3, 6, 6\], but latents are float32 \[2C,H,W\]",
    ),
    "logarithms": ({"a.npy": npy(-MOMENTS[0])}, r"float32 \[4, 6, 6\] with a standard deviation of -0\.99"),
    "mixed latents": (LATENTS | {"z.npy": npy(MOMENTS[0, :, :4, :4])}, r"z\.npy is 4x4 with 4 channels, but .* is 6x6"),
    "some unlabeled": (members(LABELS[1:]), r"no label for 1 of 5 images, the first 00000/img0\.png"),
    "not json": (members(**{"dataset.json": b"{"}), r"dataset\.json is not"),
    "no labels key": (members(**{"dataset.json": b"{}"}), r"dataset\.json is not .* \(it has no labels\)"),
    "strange labels": (members(7), r"dataset\.json is not"),
    "negative class": (members([[name, -1] for name in FILES]), "labels 00000/img0.png as -1; classes are integers"),
    "class vectors": (members([[name, [0.5]] for name in FILES]), r"as \[0\.5\]; classes are integers"),
}


@both
@pytest.mark.parametrize("what", BAD)
def test_broken_sets(write: Write, what: str, tmp_path: Path) -> None:
    content, message = BAD[what]
    if "z.png" in content and b"labels" in content["dataset.json"]:
        content = content | {"dataset.json": json.dumps({"labels": [*LABELS, ["z.png", 0]]}).encode()}
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_corrupt_zip_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path, members())
    raw = bytearray(path.read_bytes())
    at = raw.index(b"img1.png") + 30
    raw[at : at + 8] = bytes(8)
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match=r"00001/img1\.png is not a readable image \(Bad CRC-32"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("none.zip", "train", r"none\.zip does not exist; give a zip, a folder, or the word digits"),
        ("text", "train", "text is not a zip"),
        ("text", "test", "text has no split 'test'"),
    ],
)
def test_no_such_set(name: str, split: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / name, split=split)


def test_no_such_split_of_the_digits() -> None:
    with pytest.raises(DatasetError, match="choose one of train, test, all"):
        open_dataset("digits", split="validation")
