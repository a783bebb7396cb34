"""`data inspect`: what a set is, against what its teacher takes."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden_set import GOLDEN
from picture_files import encoded, saved, write_folder, write_zip
from PIL import Image

from edmdistill.checkpoints.encoder import STABLE_DIFFUSION
from edmdistill.cli import main
from edmdistill.data.inspect import DataSummary, inspect_data, to_json, to_text
from edmdistill.data.prepare import prepare_data
from edmdistill.embedded import EMBEDDED

LATENT, PIXELS = GOLDEN / "edm2-latent-cond.pkl", GOLDEN / "edm2-rgb-cond.pkl"


def latents(path: Path, scale: float = 1.0, channels: int = 4) -> Path:
    """Twenty latents with the mean and standard deviation that EDM2 declares, both multiplied."""
    rng = np.random.default_rng(0)
    members = {}
    mean, std = (np.resize(values, channels)[:, None, None] for values in STABLE_DIFFUSION["edm2"])
    for i in range(20):
        means, out = scale * (mean + std * rng.normal(size=(channels, 16, 16))), io.BytesIO()
        np.save(out, np.concatenate([means, np.full_like(means, 1e-3)]).astype(np.float32))
        members[f"00000/img-mean-std-{i:08d}.npy"] = out.getvalue()
    return write_zip(path, members)


@pytest.mark.parametrize("teacher", [None, LATENT])
def test_latents_are_compared_with_what_is_declared(teacher: Path | None, tmp_path: Path) -> None:
    good, bad = (inspect_data(latents(tmp_path / f"{k}.zip", k), teacher=teacher) for k in (1, 0.2))
    for found in (good, bad):
        assert found.declared is not None
        assert found.declared.mean == pytest.approx(STABLE_DIFFUSION["edm2"].mean, abs=1e-6)
        assert found.declared.std == pytest.approx(STABLE_DIFFUSION["edm2"].std, rel=1e-6)
        assert ("far off" in to_text(found)) == found.declared.far_off
        assert found.declared.by == ("EDM2, for a set that declares none" if teacher is None else "the teacher")
    assert good.std == pytest.approx(STABLE_DIFFUSION["edm2"].std, rel=0.05)
    assert [found.declared is not None and found.declared.far_off for found in (good, bad)] == [False, True]


def test_nothing_is_declared_for_another_vae(tmp_path: Path) -> None:
    assert inspect_data(latents(tmp_path / "a.zip", channels=8)).declared is None
    compared = inspect_data(latents(tmp_path / "b.zip", channels=8), teacher=LATENT)
    assert compared.declared is None
    assert "8 channels" in str(compared.misfit)


def summary(tmp_path: Path, classes: int, teacher: Path) -> DataSummary:
    members = {f"{i:03}/a.png": encoded(i, 16, 16) for i in range(classes)}
    prepare_data(write_folder(tmp_path / "set", members), tmp_path / "out.zip")
    return inspect_data(tmp_path / "out.zip", teacher=teacher)


def test_pictures_that_a_teacher_takes(tmp_path: Path) -> None:
    found = summary(tmp_path, 6, PIXELS)
    assert (found.misfit, found.declared) == (None, None)
    assert "edm2-rgb-cond.pkl takes these data" in to_text(found)
    assert "prepared     source set, transform none, filter none" in to_text(found)


def test_why_a_teacher_does_not_take_them(tmp_path: Path) -> None:
    found = summary(tmp_path, 7, PIXELS)
    assert found.misfit is not None
    assert "has 7 classes, but the network has 6" in found.misfit
    assert found.misfit in to_text(found)
    assert "the network takes latents of 16x16 with 4 channels" in str(
        inspect_data(found.source, teacher=LATENT).misfit
    )


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_the_moments_of_pixels_in_closed_form(batch: int, tmp_path: Path) -> None:
    """Red is 1 everywhere, green -1; blue is 1 in two of three pictures, its square always 1."""
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    pixels[..., 0] = pixels[:2, ..., 2] = 255
    pictures = {f"{i}.png": saved(Image.fromarray(array)) for i, array in enumerate(pixels)}
    read: list[int] = []
    found = inspect_data(write_folder(tmp_path / "set", pictures), batch=batch, on_progress=read.append)
    assert (found.images, found.resolution, found.channels, found.latent) == (3, 4, 3, False)
    assert found.mean == pytest.approx((1, -1, 1 / 3))
    assert found.std == pytest.approx((0, 0, 8**0.5 / 3), abs=1e-7)
    assert found.std_all == pytest.approx((1 - 1 / 81) ** 0.5)
    assert read == {1: [1, 1, 1], 2: [2, 1], 256: [3]}[batch]
    assert "size         4x4, 3 channels, 8-bit RGB" in to_text(found)
    assert "mean         1, -1, 0.3333  (pixels in [-1, 1])" in to_text(found)


def test_latents_vary_by_what_is_drawn_too(tmp_path: Path) -> None:
    """As mean + std eps: of means 3 and 5 with a deviation of 2, the variance is 1 + 4."""
    members = {}
    for i, mean in enumerate((3.0, 5.0)):
        out = io.BytesIO()
        np.save(out, np.concatenate([np.full((1, 4, 4), mean), np.full((1, 4, 4), 2.0)]).astype(np.float32))
        members[f"{i}.npy"] = out.getvalue()
    found = inspect_data(write_zip(tmp_path / "a.zip", members))
    assert (found.latent, found.channels, found.mean) == (True, 1, (4.0,))
    assert (found.std, found.std_all) == (pytest.approx((5**0.5,)), pytest.approx(5**0.5))
    assert "4x4, 1 channel, latents, means and standard deviations (float32)" in to_text(found)
    assert "(latents, before the teacher's scale)" in to_text(found)


def test_what_a_set_lacks_and_leaves_out_is_listed(tmp_path: Path) -> None:
    """Classes without images, of which the first are shown; pictures that EXIF data would turn; other files."""
    turned = encoded(0, 8, 8, "L", "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    names = [f"class {i}" + " of a long name" * (i == 1) * 9 for i in range(150)]
    document = json.dumps({"labels": [["a.png", 1], ["b.jpg", 149]], "label_names": names}).encode()
    files = {"a.png": encoded(1, 8, 8, "L"), "b.jpg": turned, "dataset.json": document, "x.txt": b"", ".y": b""}
    found = inspect_data(write_folder(tmp_path / "left out", files))
    assert [entry.label for entry in found.classes if entry.images] == [1, 149]
    assert (found.turned, found.left_out) == (1, {".y": "hidden", "x.txt": "not an image"})
    assert (found.credit, found.prepared, found.split) == (None, None, "train")
    text = to_text(found)
    lines = text.splitlines()
    assert "turned       1 by EXIF, which is ignored, as by NVIDIA's code" in lines
    assert "left out     2: hidden (.y), not an image (x.txt)" in lines
    (missing,) = [line for line in lines if line.startswith("missing")]
    assert missing.endswith("12 class 12 and 136 more")
    (long,) = [line for line in lines if line.startswith("1 class 1 ")]
    assert long.endswith(" 1")
    assert len(long) <= 80
    assert lines[-3:-1] == ["... and 30 more classes; --json lists all", ""]
    assert lines[-1].endswith("148 of the 150 classes have no image, the first 0.")
    assert sum("left out " in line for line in lines) == 1  # not in a note too
    assert json.loads(to_json(found))["classes"][149] == {"label": 149, "name": "class 149", "images": 1}


def test_a_set_without_classes_lacks_none(tmp_path: Path) -> None:
    text = to_text(inspect_data(write_folder(tmp_path / "set", {"a.png": encoded(0, 8, 8, "L")})))
    assert "classes      none" in text
    assert "missing" not in text
    assert "left out     nothing" in text


@pytest.mark.parametrize("folders", [("cat", "dog"), ("00000", "00001")])
def test_what_makes_classes_of_folders(folders: tuple[str, str], tmp_path: Path) -> None:
    files = {f"{folder}/{i}.png": encoded(i, 16, 16) for folder in folders for i in range(2)}
    source = write_folder(tmp_path / "a set", files)
    text = to_text(inspect_data(source))
    advice = re.findall(r"`edmdistill data (prepare .*)` makes its 2 top folders classes", text)
    assert bool(advice) == (folders == ("cat", "dog"))  # numbered ones are how EDM's tool shares files out
    for command in advice:
        arguments = ["data", *shlex.split(command.replace("OUT.zip", str(tmp_path / "out.zip")))]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        assert [entry.name for entry in inspect_data(tmp_path / "out.zip").classes] == [*folders]
    misfit = to_text(inspect_data(source, teacher=PIXELS))
    assert misfit.count("makes its 2 top folders classes") == len(advice)


def test_an_embedded_set_has_its_credit() -> None:
    found = inspect_data("digits", split="test")
    assert (found.images, found.split, found.credit) == (297, "test", EMBEDDED["digits"].credit)
    assert to_text(found).startswith(f"data set     digits (test)\ncredit       {found.credit}\n")
