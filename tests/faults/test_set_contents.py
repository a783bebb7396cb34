"""What is in a data set: which files are its images, which are left out and why, and whose labels they have."""

import io
import json
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edmdistill.cli import main
from edmdistill.data import labels as labels_module
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.inspect import inspect_data
from edmdistill.errors import DatasetError

Members = list[tuple[str, bytes]]


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(out, "png")
    return out.getvalue()


def images(*names: str) -> Members:
    """The i-th is all i."""
    return [(name, png(i)) for i, name in enumerate(names)]


def described(labels: object, name: str = "dataset.json", **more: object) -> tuple[str, bytes]:
    return name, json.dumps({"labels": labels} | more).encode()


def write(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.fixture
def opened(tmp_path: Path):
    """opened(members, form): the set of these files, as a zip or as a folder."""

    def make(members: Members, form: str = "zip") -> Dataset:
        if form == "zip":
            return open_dataset(write(tmp_path / "set.zip", members))
        for name, data in members:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(data)
        return open_dataset(tmp_path / "set")

    return make


TWO = images("a/0.png", "b/1.png")
FORMS = pytest.mark.parametrize("form", ["zip", "folder"])


@FORMS
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".ipynb_checkpoints/0-checkpoint.png", "hidden"),
        ("a/.ipynb_checkpoints/0-checkpoint.png", "hidden"),
        ("__MACOSX/a/._0.png", "hidden"),
        ("__MACOSX/a/0.png", "system file"),
        ("._0.png", "hidden"),
        ("a/.0.png", "hidden"),
        (".git/x.png", "hidden"),
        ("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "system file"),
        ("a/Thumbs.db", "system file"),
        ("a/labels.csv", "not an image"),
        ("a/no-suffix", "not an image"),
    ],
)
def test_what_is_no_image_is_left_out_and_needs_no_label(opened, name: str, reason: str, form: str) -> None:
    labels = [["a/0.png", 1], ["b/1.png", 0]]
    data = opened([*TWO, (name, b"junk"), described(labels)], form)
    assert data.labels(range(2)).tolist() == [1, 0]
    assert data.files == ["a/0.png", "b/1.png"]
    (note,) = data.notes
    assert note == f"{data.name}: left out 1 file: {reason} ({name})."
    assert inspect_data(data.name).left_out == {name: reason}


@FORMS
def test_the_record_of_samples_is_left_out_without_a_word(opened, form: str) -> None:
    data = opened([*images("x/000000.png", "x/000001.png"), ("x/samples.json", b"{}")], form)
    assert data.files == ["x/000000.png", "x/000001.png"]
    assert data.notes == []
    assert inspect_data(data.name).left_out == {"x/samples.json": "record of samples"}


@FORMS
@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".gif", ".ppm", ".heic", ".avif"])
def test_images_of_other_kinds_are_refused(opened, suffix: str, form: str) -> None:
    sentence = rf"holds an image in a format that is not supported, the first 0\{suffix}; .*`edmdistill data prepare`"
    with pytest.raises(DatasetError, match=sentence):
        opened([*TWO, (f"0{suffix}", b"x")], form)


def test_jpegs_by_another_suffix_are_images(opened) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "jpeg")
    assert opened([("a.jfif", out.getvalue()), ("b.JPE", out.getvalue())]).files == ["a.jfif", "b.JPE"]


NAMES = {
    "relative to the top folder": ("top/", "top/dataset.json", "{}"),
    "relative to the set": ("top/", "top/dataset.json", "top/{}"),
    "in a deeper folder": ("home/me/", "home/me/dataset.json", "{}"),
    "by another case": ("", "Dataset.JSON", "{}"),
    "from the current folder": ("", "dataset.json", "./{}"),
}


@FORMS
@pytest.mark.parametrize("how", NAMES)
def test_labels_are_found_and_their_names_matched(opened, how: str, form: str) -> None:
    prefix, place, name = NAMES[how]
    labels = [[name.format("a/0.png"), 1], [name.format("b/1.png"), 0]]
    data = opened([*images(f"{prefix}a/0.png", f"{prefix}b/1.png"), described(labels, place)], form)
    assert data.labels(range(2)).tolist() == [1, 0]
    assert data.notes == []


@pytest.mark.parametrize(("stored", "said"), [("a/é.png", "a\\é.png"), ("a\\é.png", "a/é.png")])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_slashes_and_accents_match_however_they_are_written(opened, stored: str, said: str, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    stored, said = unicodedata.normalize(form, stored), unicodedata.normalize(other, said)  # type: ignore[arg-type]
    data = opened([*images(stored, "b.png"), described([[said, 1], ["b.png", 0]])])
    assert sorted(data.labels(range(2)).tolist()) == [0, 1]
    assert int(data.labels([data.files.index(stored)])) == 1


LABELS = [["a/0.png", 0], ["b/1.png", 1]]
AMBIGUOUS = {
    "a member twice": ([*TWO, *images("a/0.png")], "holds a/0.png twice, of .* bytes; keep one"),
    "a member by two names": (
        [*TWO, *images("a/./0.png")], r"holds 'a/\./0\.png' and 'a/0\.png', which differ only in case"
    ),
    "a label twice": (
        [*TWO, described([*LABELS, ["a/0.png", 1]])], r"labels a/0\.png twice, with 0 and 1; keep one"
    ),
    "a label by two names": (
        [*TWO, described([*LABELS, ["a\\0.png", 1]])], r"twice, as 'a/0\.png' and 'a\\\\0\.png', with 0 and 1"
    ),
    "two label files": (
        [*TWO, described(LABELS), described(LABELS, "a/dataset.json")],
        r"holds two label files, a/dataset\.json and dataset\.json",
    ),
    "two descriptions of two sets": (
        [*TWO, described([["0.png", 0]], "a/dataset.json"), described([["1.png", 0]], "b/dataset.json")],
        r"holds two label files, a/dataset\.json and b/dataset\.json",
    ),
    "two images for a name": (
        [*images("a/0.png", "a/a/0.png"), described([["a/0.png", 0]], "a/dataset.json")],
        r"labels a/0\.png, which may be a/a/0\.png or a/0\.png",
    ),
    "two lists of labels": (
        [*TWO, ("dataset.json", b'{"labels": [], "labels": []}')], r"it has 'labels' twice"
    ),
    "names that do not match": (
        [*TWO, described([["data/a/0.png", 0], ["data/b/1.png", 1]])],
        r"no label for 2 of 2 images, the first a/0\.png \(it labels data/a/0\.png, which is not there\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", AMBIGUOUS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_ambiguous_shows_both_sides(opened, what: str) -> None:
    members, message = AMBIGUOUS[what]
    with pytest.raises(DatasetError, match=message):
        opened(members)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2**63, "as 9223372036854775808, but at most 100,000 classes"),
        (10**12, "as 1000000000000, but at most"),
        (10**300, "as an integer of 997 bits, but at most"),
        (True, "as True; classes are integers from 0"),
        (1.0, "as 1.0; classes are integers from 0"),
        (-1, "as -1; classes are integers from 0"),
        ("0", "as '0'; classes are integers from 0"),
        (None, "as None; classes are integers from 0"),
    ],
)
def test_labels_that_are_no_classes(opened, label: object, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"labels b/1\.png {message}"):
        opened([*TWO, described([["a/0.png", 0], ["b/1.png", label]])])


def test_classes_have_names(opened) -> None:
    data = opened([*TWO, described(LABELS, label_names=["cat", "dog", "cow"])])
    assert data.label_names == ["cat", "dog", "cow"]
    assert (data.label_dim, data.class_counts, data.missing_classes) == (3, [1, 1, 0], [2])
    assert data.tensors([1])[1].tolist() == [[0, 1, 0]]
    for names, message in [
        (["cat"], "as 1, but label_names has 1 name;"),
        ([], "label_names must be a list of printable names"),
        (["cat", "\x1b[2J"], "label_names must be a list of printable names"),
        (["cat", " "], "label_names must be a list of printable names"),
        ({"0": "cat"}, "label_names must be a list of printable names"),
    ]:
        with pytest.raises(DatasetError, match=message):
            opened([*TWO, described(LABELS, label_names=names)])


def test_labels_may_be_an_object_and_name_files_that_are_left_out(opened) -> None:
    labels = {"a/0.png": 1, "b/1.png": 0, "a/.0.png": 5}
    data = opened([*TWO, ("a/.0.png", b"junk"), described(labels, prepared="by hand")])
    assert data.labels(range(2)).tolist() == [1, 0]
    assert data.notes == [f"{data.name}: left out 1 file: hidden (a/.0.png)."]
    assert data.prepared is None
    with pytest.raises(DatasetError, match="labels 7, which is no file's name; fix it"):
        opened([*TWO, described([[7, 0]])])


def test_more_classes_than_are_read(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "MAX_CLASSES", 1)
    for names in ({}, {"label_names": ["cat", "dog"]}):
        with pytest.raises(DatasetError, match=r"labels b/1\.png as 1, but at most 1 classes are read"):
            opened([*TWO, described(LABELS, **names)])


def test_a_subset_of_a_networks_classes_is_noted(opened) -> None:
    data = opened([*TWO, described([["a/0.png", 1], ["b/1.png", 2]])])
    (note,) = data.notes
    assert "1 of the 3 classes has no image, the first 0 (the labels begin at 1" in note
    with pytest.raises(DatasetError, match="3 classes, but the network has 2, 0 to 1; its labels begin at 1: subtract"):
        data.use_classes(2)
    data.use_classes(10, ["x"] * 10)
    assert data.tensors([0])[1].shape == (1, 10)
    assert "8 of the 10 classes have no image, the first 0" in data.notes[0]


def test_other_names_for_a_class_are_noted(opened) -> None:
    data = opened([*TWO, described(LABELS, label_names=["cat", "dog", "cow"])])
    for _ in range(2):
        data.use_classes(3, ["cat", "frog", "ox"])
    assert data.notes[0] == f"{data.name}: class 1 is 'dog' there, and 'frog' to the network."
    assert len(data.notes) == 2  # and that no image is of class 2


def test_labels_of_files_that_are_not_there_are_noted(opened) -> None:
    data = opened([*TWO, described([*LABELS, ["c/2.png", 1], [".c.png", 1]])])
    assert data.notes == [f"{data.name}: dataset.json labels 2 files that are not there, the first c/2.png."]


def test_data_inspect(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", [*TWO, ("a/.x.png", b""), described(LABELS, label_names=["cat", "dog", "cow"])])
    result = CliRunner().invoke(main, ["data", "inspect", str(path)])
    assert result.exit_code == 0, result.output
    lines = {line[:12].strip(): line[12:].strip() for line in result.stdout.splitlines()}
    assert lines["images"] == "2"
    assert lines["size"] == "4x4, 3 channels, 8-bit RGB"
    assert lines["mean"].startswith("-0.9961, -0.9961, -0.9961")
    assert lines["missing"] == "2 cow"
    assert lines["left out"] == "1: hidden (a/.x.png)"
    assert lines["0 cat"] == "1"
    document = json.loads(CliRunner().invoke(main, ["data", "inspect", str(path), "--json"]).stdout)
    assert [entry["images"] for entry in document["classes"]] == [1, 1, 0]
    assert document["left_out"] == {"a/.x.png": "hidden"}
    assert document["fingerprint"] == open_dataset(path).fingerprint
    broken = CliRunner().invoke(main, ["data", "inspect", str(tmp_path / "nothing")])
    assert (broken.exit_code, broken.stdout) == (2, "")


def test_data_inspect_measures_latents(tmp_path: Path) -> None:
    """The moments are those of the latents that are drawn: the variance of the means, and the mean of the variances."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(50):
        out = io.BytesIO()
        mean = rng.normal([[[1]], [[-2]]], [[[3]], [[1]]], (2, 4, 4))
        np.save(out, np.concatenate([mean, np.full((2, 4, 4), 4.0)]).astype(np.float32))
        members.append((f"{i}.npy", out.getvalue()))
    found = inspect_data(write(tmp_path / "set.zip", members))
    assert (found.latent, found.images, found.channels, found.resolution) == (True, 50, 2, 4)
    assert found.mean == pytest.approx([1, -2], abs=0.3)
    assert found.std == pytest.approx([5, 17**0.5], rel=0.03)
