"""Drawn data sets and arrays, most of them broken: each is a data set, or an error of one sentence."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from picture_files import saved, write_zip
from PIL import Image

from edmdistill.data.datasets import open_dataset
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.images import open_images

PNG = saved(Image.new("RGB", (4, 4)))
MOMENTS = np.ones((2, 4, 4), np.float32)


def one_sentence(make: Any) -> Any:
    """What `make` returns, or None where it refuses in a line that can be printed."""
    try:
        return make()
    except EdmDistillError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 1500, text
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


FILES = ["0.png", "a/1.png"]
LABEL = st.one_of(
    st.integers(0, 3),
    st.integers(),
    st.sampled_from([2**63, 10**12, -1, True, None, 1.0, float("nan"), float("inf"), "0", [], {}, [0, 1]]),
)
FILE = st.sampled_from([*FILES, "./0.png", "a\\1.png", "/0.png", "../0.png", "b.png", "", ".", 0, None, [], {}])
PAIR = st.one_of(
    st.tuples(FILE, LABEL).map(list), st.tuples(FILE, LABEL).map(list), st.lists(LABEL, max_size=3), LABEL, st.text()
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LABELS = st.one_of(
    st.tuples(LABEL, LABEL).map(lambda labels: [[name, label] for name, label in zip(FILES, labels, strict=True)]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda two: dict(zip(FILES, two, strict=True))),
    st.lists(PAIR, max_size=3),
    ANY,
)
NAMES = st.one_of(st.none(), st.lists(st.text(max_size=5), max_size=4), st.just(["a", "b", "c", "d"]), ANY)
DOCUMENT = st.one_of(
    st.fixed_dictionaries({"labels": LABELS}, optional={"label_names": NAMES, "x": ANY}).map(json.dumps),
    ANY.map(json.dumps),
    st.text(max_size=20),
    st.sampled_from(['{"labels": ' + "[" * 100_000, "[" * 5000 + "]" * 5000]),
    st.just('{"labels": [["0.png", ' + "9" * 5000 + "]]}"),
)


@settings(max_examples=250)
@given(DOCUMENT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
@example(b'\xef\xbb\xbf{"labels": [["0.png", 0], ["a/1.png", 1]]}')
@example('{"labels": [["0.png", 0], ["a/1.png", 1]]}'.encode("utf-16"))
def test_descriptions(folder: Path, document: bytes) -> None:
    path = write_zip(folder / "set.zip", {"0.png": PNG, "a/1.png": PNG, "dataset.json": document})
    data = one_sentence(lambda: open_dataset(path))
    if data is not None:
        _, labels = data.tensors([0, 1])
        assert (labels is None) == (data.label_dim == 0)
        assert labels is None or torch.equal(labels.sum(1), torch.ones(2))
        assert all(note.isprintable() for note in data.notes)


NAME_PART = st.one_of(
    st.sampled_from(
        ["0.png", "a", "..", ".", "", ".x", "__MACOSX", "samples.json", "000000.png", "dataset.json", "x.tif"]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)
NAME = (
    st.lists(NAME_PART, min_size=1, max_size=3)
    .map("/".join)
    .filter(lambda name: len(name.encode("utf-8", "replace")) < 200)
)


@settings(max_examples=100)
@given(st.lists(st.tuples(NAME, st.sampled_from([PNG, b"", PNG[:40], b'{"labels": null}'])), max_size=4))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names(folder: Path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo()
            info.filename = name.encode("utf-8", "replace").decode()
            archive.writestr(info, data)
    data = one_sentence(lambda: open_dataset(folder / "set.zip"))
    if data is not None:
        assert len(data) > 0
        assert all(name.isprintable() for name in [*data.files, *data.notes])


DESCR = st.one_of(
    st.sampled_from(["|u1", "<f4", "<f8", ">f4", "<i8", "|O", "<U4", "|V0", "<U0", "|b1", "<M8[s]", "<f4,<f4"]),
    st.text(max_size=6),
    st.sampled_from([[("a", "<f4")], [("a", "|O")], ("<f4", (2,)), 4, None, []]),
)
LENGTH = st.one_of(st.integers(0, 8), st.sampled_from([4, 4, 4, 3, 1, -1, 2**31, 2**40, 2**63, 10**30, True, 1.5, "4"]))
SHAPE = st.one_of(
    st.sampled_from([(2, 4, 4), (2, 4, 4, 3), (2, 4, 4, 1), (0, 4, 4, 3), (2, 3, 4, 4)]),
    st.lists(LENGTH, max_size=5).map(tuple),
    st.sampled_from([(1,) * 9, (1,) * 70, 4, "x", None, [2, 4, 4]]),
)
HEADER = st.fixed_dictionaries(
    {"descr": DESCR, "fortran_order": st.sampled_from([False, False, False, True, 0, "x"]), "shape": SHAPE}
)
TEXT = st.one_of(
    HEADER.map(repr),
    HEADER.map(repr),
    st.text(max_size=20),
    st.sampled_from(
        ["(" * 5000, "{" * 200, "'" * 9, "__import__('os')", "{'descr': '<f4'}", "1" * 9000, "9L", "-" * 999]
    ),
)
DATA = st.sampled_from(
    [b"", b"\1" * 7, MOMENTS.tobytes(), bytes(96), b"\xff" * 128, np.full(96, np.nan, "<f4").tobytes()]
)


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """An .npy, mostly broken."""
    text = draw(TEXT).encode("latin-1", "replace") + b"\n"
    version = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 0, 9]))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 60000]))
    size = struct.pack("<H" if version == 1 else "<I", max(length, 0) % 2**16)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + draw(DATA)


@settings(max_examples=100)
@given(arrays() | st.binary(max_size=100).map(lambda rest: b"\x93NUMPY\x01\x00" + rest))
def test_arrays(folder: Path, data: bytes) -> None:
    latents = one_sentence(lambda: open_dataset(write_zip(folder / "set.zip", {"0.npy": data})))
    if latents is not None:
        assert bool(latents.tensors([0])[0].isfinite().all())
    (folder / "x.npy").write_bytes(data)
    for path in (folder / "x.npy", write_zip(folder / "x.npz", {"images.npy": data})):
        images = one_sentence(lambda path=path: open_images(path, 10))
        if images is not None:
            assert one_sentence(lambda images=images: images.read(range(images.count))).shape == (
                images.count,
                *images.size,
            )


COLUMN = st.one_of(
    st.sampled_from([np.arange(2), np.array([-1, -1]), np.array([0, -1]), np.array([2**64 - 1, 0], np.uint64)]),
    st.sampled_from([np.zeros(2), np.zeros((2, 1), int), np.zeros(3, int), np.array("x"), np.zeros(2, bool)]),
)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["labels", "seeds", "arr_0", "arr_1", "mu", "sigma", "images", "\x1b"]),
        st.one_of(COLUMN, st.just(np.zeros((2, 4, 4, 3), np.uint8))),
        max_size=4,
    )
)
def test_columns(folder: Path, columns: dict[str, np.ndarray]) -> None:
    np.savez(folder / "x.npz", **columns)
    images = one_sentence(lambda: open_images(folder / "x.npz", 10))
    if images is not None:
        assert images.classes is None or (images.classes >= 0).all()
        assert one_sentence(lambda: images.read(range(2))).shape == (2, 3, 4, 4)


GOOD = {"0.png": PNG, "a/1.png": PNG, "dataset.json": b'{"labels": [["0.png", 0], ["a/1.png", 1]]}'}


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4), st.none() | st.integers(0, 10**4))
def test_mutated_zips(folder: Path, changes: list[tuple[int, int]], length: int | None) -> None:
    raw = bytearray(write_zip(folder / "good.zip", GOOD).read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    (folder / "set.zip").write_bytes(raw if length is None else raw[: length % len(raw)])
    data = one_sentence(lambda: open_dataset(folder / "set.zip"))
    if data is not None:
        assert len(data.fingerprint) == 64


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
@settings(max_examples=50)
@given(data=st.data())
def test_mutated_images(folder: Path, kind: str, data: st.DataObject) -> None:
    out = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(out, kind, **({} if kind == "bmp" else {"exif": exif.tobytes()}))
    raw = bytearray(out.getvalue())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=5)):
        raw[at] = value
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2, 30]))]
    opened = one_sentence(lambda: open_dataset(write_zip(folder / "set.zip", {f"0.{kind}": bytes(raw)})))
    assert opened is None or opened.img_channels in (1, 3)
