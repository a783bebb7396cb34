"""`data inspect`: what a set is, against what its teacher takes."""

import io
from pathlib import Path

import numpy as np
import pytest
from golden_set import GOLDEN
from picture_files import encoded, write_folder, write_zip

from edmdistill.checkpoints.encoder import STABLE_DIFFUSION
from edmdistill.data.inspect import DataSummary, inspect_data, to_text
from edmdistill.data.prepare import prepare_data

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
        assert (found.declared.by == "the teacher") == (teacher is not None)
    assert good.std == pytest.approx(STABLE_DIFFUSION["edm2"].std, rel=0.05)
    assert [found.declared is not None and found.declared.far_off for found in (good, bad)] == [False, True]


def test_nothing_is_declared_for_another_vae(tmp_path: Path) -> None:
    assert inspect_data(latents(tmp_path / "a.zip", channels=8)).declared is None


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
