"""Files that are no images, or other images than a network can be trained on or measured by: one sentence each."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from picture_files import raw_png, saved, write_zip
from PIL import Image

from edmdistill.cli import main
from edmdistill.data.datasets import open_dataset
from edmdistill.data.inspect import inspect_data, to_text
from edmdistill.errors import DatasetError
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.images import Images, is_images, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
FRAMES = [Image.fromarray(image) for image in PIXELS]


@pytest.fixture
def one(tmp_path: Path) -> Callable[[bytes], Path]:
    """one(data): a set of one file, 0.png."""
    return lambda data: write_zip(tmp_path / "set.zip", {"0.png": data})


def animated(form: str) -> bytes:
    return saved(FRAMES[0], form, save_all=True, append_images=FRAMES[1:])


def deep(color: int) -> bytes:
    """A PNG of 4x4 with 16 bits a channel; color 0: gray, 2: RGB."""
    return raw_png(4, 4, 16, color, bytes(4 * (1 + 4 * 2 * (3 if color else 1))))


RGB = FRAMES[0]
OTHERS = {
    "apng": (animated("PNG"), "is an animation of 4 frames; keep one frame as a PNG"),
    "webp": (animated("WEBP"), "is an animation of 4 frames; keep one frame as a PNG"),
    "gif": (animated("GIF"), r"is not a readable image \(a GIF\)"),
    "tiff": (saved(RGB, "TIFF"), r"is not a readable image \(a TIFF\)"),
    "ppm": (saved(RGB, "PPM"), r"is not a readable image \(a PPM\)"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(50), r"is not a readable image \(a HEIC or AVIF\)"),
    "web page": (b"<!DOCTYPE html>\n<html>", r"is not a readable image \(a web page or an SVG\)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"\(a Git LFS pointer, fetched by `git lfs pull`\)"),
    "empty": (b"", r"is not a readable image \(an empty file\)"),
    "noise": (bytes(range(200)), r"is not a readable image \(none of PNG, BMP, WEBP, JPEG\)"),
    "cut": (saved(RGB, "PNG")[:90], "is not a readable image"),
    "bits": (
        saved(RGB.convert("1"), "PNG"),
        r"has mode 1 \(black and white, one bit a pixel\); convert it .*, as `edmdistill data prepare` does$",
    ),
    "palette": (saved(RGB.convert("P"), "PNG"), r"has mode P \(colors from a palette\); convert"),
    "alpha": (saved(RGB.convert("RGBA"), "PNG"), r"has mode RGBA \(transparency\); convert"),
    "gray alpha": (saved(RGB.convert("LA"), "PNG"), r"has mode LA \(transparency\)"),
    "print": (saved(RGB.convert("CMYK"), "JPEG"), r"has mode CMYK \(colors for print\)"),
    "16 bits": (deep(0), r"has mode I;16.* \(more than 8 bits a channel\); .* or RGB$"),
    "16 bits RGB": (deep(2), r"has mode RGB \(more than 8 bits a channel\)"),
    "wide": (saved(RGB.resize((8, 4)), "PNG"), r"0\.png is 8x4 with 3 channels, but images must be square; `edmd"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_images(what: str, one: Callable[[bytes], Path]) -> None:
    data, message = OTHERS[what]
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(one(data))
    assert str(caught.value).isprintable()
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_turns_nothing_and_is_said(form: str, one: Callable[[bytes], Path]) -> None:
    """NVIDIA's code does not turn an image either."""
    exif = Image.Exif()
    exif[0x112] = 6
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    stored, described = (saved(RGB, form, **options, **more) for more in ({}, {"exif": exif.tobytes()}))
    plain = open_dataset(one(stored)).images([0])
    source = one(described)
    assert torch.equal(open_dataset(source).images([0]), plain)
    for found, count in ((inspect_data(source), 1), (inspect_data(one(stored)), 0)):
        assert found.turned == count
        assert ("turned       1 by EXIF, which is ignored" in to_text(found)) == bool(count)


def test_a_phones_jpeg_with_a_preview_is_one_image(one: Callable[[bytes], Path]) -> None:
    assert len(open_dataset(one(animated("MPO")))) == 1


def latents(**changes: object) -> dict[str, bytes]:
    moments = np.random.default_rng(0).random((3, 4, 2, 2), dtype=np.float32)
    for place, value in changes.items():
        moments[1][{"mean": (1, 0, 0), "std": (2, 0, 0)}[place]] = value
    members = {}
    for i, array in enumerate(moments):
        out = io.BytesIO()
        np.save(out, array)
        members[f"0000{i}.npy"] = out.getvalue()
    return members


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("place", "channel"), [("mean", 1), ("std", 2)])
def test_latents_are_finite(place: str, channel: int, value: float, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", latents(**{place: value}))
    with pytest.raises(DatasetError, match=rf"00001\.npy \(image 1\) holds values that are not finite, .* {channel};"):
        open_dataset(path)


def test_latents_that_were_scaled_already_are_refused(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).random((4, 2, 2), dtype=np.float32)
    moments[2:] = 0
    out = io.BytesIO()
    np.save(out, moments)
    path = write_zip(tmp_path / "set.zip", {"0.npy": out.getvalue()})
    with pytest.raises(
        DatasetError, match="standard deviation of 0 everywhere, so these latents were drawn and scaled"
    ):
        open_dataset(path)


def test_sources_of_other_kinds_are_named(tmp_path: Path) -> None:
    good = write_zip(tmp_path / "good.zip", {"0.png": saved(RGB, "PNG"), "1.png": saved(RGB, "PNG")}).read_bytes()
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "good.zip", "good.zip")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "good.zip", "good.zip")
    files = {
        "cut.zip": (
            good[:200],
            r"is not a whole zip \(File is not a zip file\): it was cut off at 200 bytes or damaged",
        ),
        "empty.zip": (b"", "is an empty file; give a zip, a folder, or the word digits"),
        "text.zip": (b"hello", "is not a zip; give a zip, a folder, or the word digits"),
        "x.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "is a 7-Zip archive; unpack it and give the folder"),
        "x.png": (saved(RGB, "PNG"), "is a single image; give a zip, a folder"),
        "x.pkl": (b"\x80\x04" + bytes(50), "is a pickle; give a zip, a folder"),
        "x.npz": (
            good,
            "is an .npz, which `eval` measures, or measures against, not a data set; give a zip, a folder",
        ),
        "set.tar": (None, "is a tar archive; unpack it and give the folder"),
        "set.tar.gz": (None, "is a gzip file; unpack it and give the folder"),
    }
    for name, (data, message) in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DatasetError, match=message):
            open_dataset(tmp_path / name)


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(images: Images) -> torch.Tensor:
    """All images, in batches of two and the rest."""
    return torch.cat([images.read(range(at, min(at + 2, images.count))) for at in range(0, images.count, 2)])


def test_images_in_arrays_are_the_images(tmp_path: Path) -> None:
    """Ours, ADM's with its labels, deflated, and an .npy."""
    own, labels = PIXELS[:3], np.array([2, 0, 1])
    np.save(tmp_path / "x.npy", own)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=own)
    sources = {
        save(tmp_path / "ours.npz", images=own, labels=labels, seeds=labels): [2, 0, 1],
        save(tmp_path / "adm.NPZ", arr_0=own, arr_1=labels): [2, 0, 1],
        tmp_path / "deflated.npz": None,
        tmp_path / "x.npy": None,
    }
    (tmp_path / "adm.NPZ.npz").rename(tmp_path / "adm.NPZ")
    for source, classes in sources.items():
        assert is_images(source)
        images = open_images(source, 3)
        assert (images.count, images.size) == (3, (3, 8, 8))
        assert np.array_equal(pixels(images).numpy(), own.transpose(0, 3, 1, 2))
        assert np.array_equal(images.read(range(1, 2)).numpy(), own[1:2].transpose(0, 3, 1, 2))
        assert (None if images.classes is None else images.classes.tolist()) == classes
    assert open_images(tmp_path / "ours.npz", 3).label_source == "balanced"


UINT8 = np.zeros((2, 8, 8, 3), np.uint8)
ARRAYS = {
    "statistics": (
        {"mu": np.zeros(4), "sigma": np.eye(4)},
        r"holds the statistics of a reference \(mu and sigma\) and no images; give .* as --ref the images",
    ),
    "floats": ({"images": UINT8.astype(np.float32)}, r"float32 \[2, 8, 8, 3\], .*; turn \[-1, 1\] into uint8 by"),
    "none": ({"images": UINT8[:0]}, r"images is empty, uint8 \[0, 8, 8, 3\]"),
    "channels first": ({"images": UINT8.transpose(0, 3, 1, 2)}, r"move the channels to the end by \.transpose"),
    "no channels": ({"arr_0": UINT8[..., 0]}, r"give gray images an axis of channels by \[\.\.\., None\]"),
    "alpha": ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, r"uint8 \[2, 8, 8, 4\], but uint8 .* of 1 or 3 channels"),
    "nothing": ({}, "holds nothing, but images or arr_0 were expected"),
    "Fortran": ({"images": np.asfortranarray(UINT8)}, "Fortran order: save numpy.ascontiguousarray"),
    "some classes": ({"images": UINT8, "labels": np.array([1, -1])}, "has classes and, for 1 image, none; label all"),
    "few labels": ({"images": UINT8, "labels": np.array([1])}, r"labels are int64 \[1\], but an integer for each of"),
    "large labels": ({"images": UINT8, "labels": np.array([1, 2**63], np.uint64)}, r"labels are uint64 \[2\], but an"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_are_no_images(what: str, tmp_path: Path) -> None:
    arrays, message = ARRAYS[what]
    path = save(tmp_path / "x.npz", **arrays)
    with pytest.raises(DatasetError, match=message):
        open_images(path, 10)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_that_were_cut(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    np.savez(path, images=UINT8) if kind == "npz" else np.save(path, UINT8)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(
        DatasetError, match="is not a whole zip" if kind == "npz" else "claims 384 bytes, but there are 172"
    ):
        open_images(path, 10)


def test_a_lossy_image_is_not_measured_whatever_it_is_called(one: Callable[[bytes], Path]) -> None:
    jpeg = one(saved(RGB, "JPEG"))
    assert len(open_dataset(jpeg)) == 1
    with pytest.raises(DatasetError, match=r"0\.png is a JPEG, .* changes every metric; use PNGs"):
        open_images(jpeg, 0)


def test_eval_of_images(tmp_path: Path) -> None:
    """What is left out is said, what says how a network draws is refused by its name."""
    folder = tmp_path / "images"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for i, image in enumerate(FRAMES):
        image.save(folder / f"{i:06}.png")
    FRAMES[0].save(folder / ".ipynb_checkpoints" / "000000-checkpoint.png")
    reference = write_zip(tmp_path / "ref.zip", {f"{i}.png": saved(image, "PNG") for i, image in enumerate(FRAMES)})

    def run(*options: str) -> tuple[int, str, str]:
        words = ["eval", str(folder), "--protocol", "pixels", "--ref", str(reference), "--device", "cpu", *options]
        result = CliRunner().invoke(main, words)
        return result.exit_code, result.stdout, result.stderr

    code, table, said = run()
    assert (code, "4 images against ref.zip" in table) == (0, True)
    assert "left out 1 file: hidden (.ipynb_checkpoints/000000-checkpoint.png)." in said
    for options in (["--seeds", "0-1"], ["--nfe", "2"], ["--guidance", "2"], ["--t", "80"]):
        code, table, said = run(*options)
        assert (code, table) == (2, "")
        assert f"{options[0]} says how a network is sampled, but {folder} holds images" in said


def test_images_read_before_are_measured_like_their_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", images=PIXELS)
    reference = write_zip(tmp_path / "ref.zip", {f"{i}.png": saved(image, "PNG") for i, image in enumerate(FRAMES)})
    direct, before = (evaluate(source, reference, protocol="pixels") for source in (path, open_images(path, 0)))
    assert direct.metrics == before.metrics
