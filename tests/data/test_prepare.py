"""`data prepare`: the pixels, names and classes of the official tool, whatever the source, and however often killed."""

import io
import json
import zipfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import PIL
import pytest
from picture_files import (
    cifar10,
    digest,
    encoded,
    read_document,
    read_images,
    saved,
    tar_bytes,
    write_folder,
    write_mnist,
    write_zip,
)
from PIL import Image

from edmdistill.data.datasets import open_dataset
from edmdistill.data.edm_zip import encode_png
from edmdistill.data.packing import Packed, PackJob, packed_chunks
from edmdistill.data.pictures import ANIMATED, CLIPPED, CMYK, GRAYSCALE, PALETTE, TRANSPARENCY, TURNED
from edmdistill.data.prepare import prepare_data, to_text
from edmdistill.errors import DatasetError, EdmDistillError

GOLDEN = Path(__file__).parents[1] / "golden" / "prepare"
CASES = json.loads((GOLDEN / "expected.json").read_text())["cases"]
PICTURES = {f"{'ab'[i % 2]}/{i:02}.png": encoded(i, 12 + i, 9 + i % 5) for i in range(20)}
HALF = {"resolution": 8, "transform": "center-crop"}


@pytest.mark.parametrize("case", CASES)
def test_official_goldens(case: str, tmp_path: Path) -> None:
    if case == "none-32" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow 13 resizes the height of b.png, which is high, first; it made the official code's pixels")
    transform, _, size = case.rpartition("-")
    out = tmp_path / "out.zip"
    prepare_data(GOLDEN / "source", out, resolution=int(size), transform=transform, workers=2)
    assert {name: digest(pixels) for name, pixels in read_images(out).items()} == CASES[case]["pixels_sha256"]
    document = read_document(out)
    assert document["labels"] == CASES[case]["labels"]
    assert document["label_names"] == ["tench, Tinca tinca", "crane", "daisy"]
    data = open_dataset(out)
    assert (data.label_dim, data.label_names, data.notes) == (3, document["label_names"], [])


def test_threads_are_as_many_as_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node with 128 cores, a batch job may have two."""
    asked: list[int] = []

    def chunks(job: PackJob, done: int, workers: int) -> Generator[list[Packed]]:
        asked.append(workers)
        return packed_chunks(job, done, workers)

    monkeypatch.setattr("edmdistill.data.prepare.packed_chunks", chunks)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {4, 5}, raising=False)
    prepare_data(GOLDEN / "source", tmp_path / "out.zip", resolution=8, transform="center-crop")
    assert asked == [2]


CHANGED = {
    "gray": (encoded(0, 8, 8, "L"), GRAYSCALE),
    "gray and alpha": (encoded(0, 8, 8, "LA"), TRANSPARENCY),
    "alpha": (encoded(0, 8, 8, "RGBA"), TRANSPARENCY),
    "palette": (saved(Image.new("P", (8, 8), 3)), PALETTE),
    "palette and alpha": (saved(Image.new("P", (8, 8), 3), transparency=b"\0\x80@\xff"), TRANSPARENCY),
    "deep": (saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 300)), CLIPPED),
    "print": (encoded(0, 8, 8, "CMYK", "jpeg"), CMYK),
    "turned": (
        encoded(0, 8, 8, "RGB", "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
        TURNED,
    ),
    "animated": (
        saved(Image.new("L", (8, 8), 3), "gif", save_all=True, append_images=[Image.new("L", (8, 8), 200)]),
        ANIMATED,
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_the_official_tool_changes_silently_is_counted(what: str, tmp_path: Path) -> None:
    data, change = CHANGED[what]
    source = write_folder(tmp_path / "set", {"a.png": data, "b.png": encoded(1, 8, 8)})
    summary = prepare_data(source, tmp_path / "out.zip")
    assert summary.record["changes"][change] == 1
    assert f"1: {change}" in to_text(summary)
    first, second = read_images(tmp_path / "out.zip").values()
    for pixels, name in ((first, "a.png"), (second, "b.png")):
        with Image.open(source / name) as image:
            assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_the_zip_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", PICTURES)
    for workers in (1, 3):
        prepare_data(source, tmp_path / f"{workers}.zip", workers=workers, **HALF)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    out.write_text("precious")
    with pytest.raises(EdmDistillError, match=r"out\.zip already exists: .* --overwrite"):
        prepare_data(source, out, **HALF)
    assert out.read_text() == "precious"
    prepare_data(source, out, overwrite=True, **HALF)
    assert len(open_dataset(out)) == 20


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tgz"])
def test_the_same_again_is_done_and_anything_else_is_refused(form: str, tmp_path: Path) -> None:
    def source(pictures: dict[str, bytes]) -> Path:
        if form == "folder":
            return write_folder(tmp_path / "set", pictures)
        path = tmp_path / "set"
        if form == "zip":
            return write_zip(path, pictures)
        path.write_bytes(tar_bytes(pictures, "w" if form == "tar" else "w:gz"))
        return path

    out = tmp_path / "out.zip"
    made = prepare_data(source(PICTURES), out, **HALF)
    before = out.read_bytes()
    again = prepare_data(source(PICTURES), out, **HALF)
    assert (again.record, again.classes, again.notes) == (
        made.record,
        made.classes,
        (f"{out} already holds these images.",),
    )
    for options in ({"max_images": 3}, {"transform": "none"}, {"labels": "none"}, {"resolution": 2}):
        with pytest.raises(EdmDistillError, match="already exists"):
            prepare_data(tmp_path / "set", out, **HALF | options)
    others = PICTURES | {"b/19.png": PICTURES["b/19.png"][:-1] + b"?"}  # of the same size
    with pytest.raises(EdmDistillError, match="already exists"):
        prepare_data(source(others), out, **HALF)
    for more in ("a/more.png", "b/the-last.png"):
        with pytest.raises(EdmDistillError, match="already exists"):
            prepare_data(source(PICTURES | {more: encoded(5, 12, 9)}), out, **HALF)
        if form == "folder":
            (tmp_path / "set" / more).unlink()
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set"]


def test_the_first_pictures_keep_the_classes_of_all(tmp_path: Path) -> None:
    prepare_data(write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip", max_images=3, **HALF)
    document = read_document(tmp_path / "out.zip")
    assert document["labels"] == [[f"00000/img0000000{i}.png", 0] for i in range(3)]
    assert document["label_names"] == ["a", "b"]
    assert (document["prepared"]["pictures"], document["prepared"]["max_images"]) == (3, 3)


def test_the_record_says_how_the_set_was_made(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", PICTURES | {"a/notes.txt": b"x"})
    record = prepare_data(source, tmp_path / "out.zip", **HALF).record
    assert record == read_document(tmp_path / "out.zip")["prepared"]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o644}  # as unpacked
    assert (record["source"], record["source_kind"], record["left_out"]) == ("set", "folder", {"not an image": 1})
    assert (record["crop"], record["filter"]) == ("the largest square in the middle", "lanczos")
    assert (record["size"], record["channels"], record["images"], record["skipped"]) == ([8, 8], 3, 20, 0)
    copy = write_folder(tmp_path / "copy", PICTURES)
    assert prepare_data(copy, tmp_path / "b.zip", **HALF).record["source_sha256"] == record["source_sha256"]
    (copy / "b" / "01.png").write_bytes(PICTURES["b/01.png"] + b"\0")
    assert prepare_data(copy, tmp_path / "c.zip", **HALF).record["source_sha256"] != record["source_sha256"]


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        ({"a.png": encoded(0, 8, 4)}, {}, r"a\.png is 8x4, and images of a data set are squares.*--resolution"),
        ({"a.png": encoded(0, 6, 6)}, {}, r"a\.png is 6x6, and images of a data set are squares, of a power of two"),
        (
            {"a.png": encoded(0, 8, 8), "b.png": encoded(0, 4, 4)},
            {},
            r"b\.png is 4x4 \(RGB\), but the pictures before it are 8x8 \(RGB\); give --resolution",
        ),
        (
            {"a.png": encoded(0, 4, 8)},
            {"resolution": 8, "transform": "center-crop-wide"},
            "center-crop-wide leaves no picture of 1",
        ),
        ({"a.png": b""}, {}, r"a\.png is not a readable picture \(an empty file\)"),
        ({"a.png": b"%!PS-Adobe"}, {}, r"a\.png is not a readable picture \(none of PNG, JPEG"),
        ({"a.eps": b"%!PS-Adobe"}, {}, r"an image in a format that is not supported, the first a\.eps"),
        ({"a.txt": b"x"}, {}, r"holds no pictures \(left out: not an image \(a\.txt\)\)"),
        (
            {"a.png": encoded(0, 8, 8).replace(b"\0\0\0\x08\0\0\0\x08", b"\0\0\xff\xff\0\0\xff\xff")},
            {},
            "not a readable",
        ),
    ],
)
def test_pictures_that_make_no_set(
    pictures: dict[str, bytes], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "set", pictures)
    with pytest.raises(DatasetError, match=message) as caught:
        prepare_data(source, tmp_path / "out.zip", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.zip.parts"] == ["set"]


def test_a_png_is_read_back_as_it_was_and_is_not_compressed(tmp_path: Path) -> None:
    for mode in ("L", "RGB"):
        image = Image.open(io.BytesIO(encoded(3, 33, 7, mode)))
        image.paste(image.crop((0, 0, 1, 1)).resize((33, 5)))  # noise alone would not be compressed anyway
        data = encode_png(image)
        (tmp_path / "b.png").write_bytes(data)
        with Image.open(tmp_path / "b.png") as back:
            assert (back.mode, back.size, back.tobytes()) == (mode, image.size, image.tobytes())
        assert len(data) > 33 * 7 * len(mode)


@pytest.mark.parametrize(("labels", "names"), [([0, 1, 1], ["a", "b"]), ([0, 1, 0], ["a", "c"]), (None, None)], ids=str)
def test_other_classes_of_the_same_pictures_are_no_set_that_is_there(
    labels: list[int] | None, names: list[str] | None, tmp_path: Path
) -> None:
    def described(labels: list[int] | None, names: list[str] | None) -> Path:
        pairs = None if labels is None else [[name, label] for name, label in zip(pictures, labels, strict=True)]
        content = {"labels": pairs} | ({} if names is None else {"label_names": names})
        return write_folder(tmp_path / "set", pictures | {"dataset.json": json.dumps(content).encode()})

    pictures = {f"{i}.png": encoded(i, 8, 8) for i in range(3)}
    out = tmp_path / "out.zip"
    prepare_data(described([0, 1, 0], ["a", "b"]), out)
    assert prepare_data(described([0, 1, 0], ["a", "b"]), out).notes == (f"{out} already holds these images.",)
    with pytest.raises(EdmDistillError, match=r"out\.zip already exists"):
        prepare_data(described(labels, names), out)


@pytest.mark.parametrize("name", ["00000/img00000099.png", "mine.png"])
def test_a_set_whose_images_were_renamed_is_not_known(name: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", {f"{i}/0.png": encoded(i, 8, 8) for i in range(2)})
    prepare_data(source, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        members = {name if "1" in old else old: archive.read(old) for old in archive.namelist()}
    write_zip(tmp_path / "out.zip", members)
    with pytest.raises(EdmDistillError, match="already exists"):
        prepare_data(source, tmp_path / "out.zip")


@pytest.mark.parametrize("names", [None, ["a", "b", "c", "d", "e"]], ids=["numbers", "names"])
def test_the_number_of_classes(names: list[str] | None, tmp_path: Path) -> None:
    """By the names, or else the largest; the same when the set is there already."""
    pictures = {name: encoded(0, 8, 8) for name in ("a.png", "b.png")}
    content = {"labels": [[name, 2 * i] for i, name in enumerate(pictures)], "label_names": names}
    source = write_folder(tmp_path / "set", pictures | {"dataset.json": json.dumps(content).encode()})
    for _ in range(2):
        summary = prepare_data(source, tmp_path / "out.zip")
        assert summary.classes == (3 if names is None else 5)
        assert f"classes      {summary.classes}\n" in to_text(summary) + "\n"


def test_what_is_left_out_is_counted_and_its_number_is_free(tmp_path: Path) -> None:
    """The positions of images are those of pictures, as in the official tool."""
    pictures = {"a.png": encoded(0, 4, 8), "b.png": encoded(1, 16, 9), "c.png": encoded(2, 16, 9)}
    source = write_folder(tmp_path / "set", pictures)
    summary = prepare_data(source, tmp_path / "out.zip", resolution=(16, 9), transform="center-crop-wide")
    record = summary.record
    assert (record["pictures"], record["images"], record["skipped"]) == (3, 2, 1)
    assert list(read_images(tmp_path / "out.zip")) == ["00000/img00000001.png", "00000/img00000002.png"]
    assert "skipped      1, too small or too high for center-crop-wide" in to_text(summary)
    assert "3 pictures read" in to_text(summary)
    again = prepare_data(source, tmp_path / "out.zip", resolution=(16, 9), transform="center-crop-wide")
    assert (again.record, len(again.notes)) == (record, 1)


def test_gray_pictures_stay_gray(tmp_path: Path) -> None:
    source = write_mnist(tmp_path / "mnist", np.ones((2, 28, 28), np.uint8), np.zeros(2, np.uint8))
    summary = prepare_data(source, tmp_path / "out.zip")
    assert (summary.record["channels"], "2 of 32x32, grayscale" in to_text(summary)) == (1, True)


def test_pictures_as_they_are(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", {f"{i}.png": encoded(i, 8, 8) for i in range(3)})
    record = prepare_data(source, tmp_path / "out.zip", max_images=5).record
    assert (record["transform"], record["resolution"], record["filter"]) == ("none", None, "none")
    assert (record["pictures"], record["max_images"]) == (3, 5)


def test_the_same_part_of_a_source_again_is_done(tmp_path: Path) -> None:
    archive, folder = tmp_path / "cifar.tar", tmp_path / "set"
    archive.write_bytes(tar_bytes(cifar10(2, 4)[0]))
    first = {"labels": [["a.png", 0], ["b.png", 1]]}  # of three
    write_folder(folder, {name: encoded(0, 8, 8) for name in ("a.png", "b.png", "c.png")})
    (folder / "dataset.json").write_text(json.dumps(first))
    for source, options in ((archive, {"split": "test"}), (folder, {"max_images": 2})):
        out = tmp_path / f"{source.name}.zip"
        made = prepare_data(source, out, **options)
        assert prepare_data(source, out, **options).notes == (f"{out} already holds these images.",)
        assert made.record["images"] == 2
    folder.rename(tmp_path / "other")
    with pytest.raises(EdmDistillError, match="already exists"):  # its record would name another source
        prepare_data(tmp_path / "other", tmp_path / "set.zip", max_images=2)


def test_zips_of_a_set_are_prepared_like_its_folder(tmp_path: Path) -> None:
    described = {"dataset.json": json.dumps({"labels": [[name, i % 3] for i, name in enumerate(PICTURES)]}).encode()}
    for source in (
        write_folder(tmp_path / "set", PICTURES | described),
        write_zip(tmp_path / "set.zip", PICTURES | described),
    ):
        prepare_data(source, tmp_path / "out.zip", overwrite=True, **HALF)
        labels = [label for _, label in read_document(tmp_path / "out.zip")["labels"]]
        assert labels == [list(PICTURES).index(name) % 3 for name in sorted(PICTURES)]
