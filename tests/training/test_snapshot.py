"""Grids of samples, and of the networks of a run."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edmdistill.data.datasets import open_dataset
from edmdistill.errors import DatasetError
from edmdistill.training import snapshot
from edmdistill.training.run import Run


def test_samples_that_are_not_finite_are_left_white_and_counted(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Black would look like a sample."""
    images = torch.full((20, 1, 8, 8), -0.5)
    images[3] = torch.nan
    monkeypatch.setattr(snapshot, "sample", lambda *args, **options: images.clone())
    heard: list[str] = []
    snapshot.save_sample_grid(start("sid"), tmp_path, heard.append)
    assert heard == [f"1 of 20 samples are not finite, and left white in {tmp_path / '000000000.png'}."]
    assert set(np.unique(np.asarray(Image.open(tmp_path / "000000000.png")))) == {64, 255}


def test_a_grid_does_not_pass_as_data(start: Callable[..., Run], tmp_path: Path) -> None:
    """RUN/samples and RUN/x0 hold many images in one, and are no data set."""
    run = start("sid")
    for save in (snapshot.save_sample_grid, snapshot.save_role_grid):
        save(run, tmp_path / save.__name__, pytest.fail)
        with pytest.raises(DatasetError, match="is a grid of edmdistill, which shows many images"):
            open_dataset(tmp_path / save.__name__)


@pytest.mark.parametrize(
    ("method", "role", "second"), [("fmd", "generator", 0), ("cosim", "auxiliary", math.atan(160))]
)
def test_networks_of_two_times_are_compared_at_their_own(
    method: str, role: str, second: float, start: Callable[..., Run], tmp_path: Path
):
    """A generator's jumps lead to the data, and an auxiliary score is of jumps from noise."""
    run, seen = start(method), list[float]()
    run.networks[role].register_forward_pre_hook(lambda network, inputs: seen.append(float(inputs[3])))
    snapshot.save_role_grid(run, tmp_path, pytest.fail)
    assert seen == [pytest.approx(second)] * len(snapshot.GRID_SIGMAS)


def test_rows_of_networks_that_are_not_finite_are_named(start: Callable[..., Run], tmp_path: Path):
    run, heard = start("sid"), list[str]()
    with torch.no_grad():
        run.networks["auxiliary"].network.out_gain.fill_(math.nan)
    snapshot.save_role_grid(run, tmp_path, heard.append)
    sentence = f"10 of 10 images in row auxiliary are not finite, and left white in {tmp_path / '000000000.png'}."
    assert heard == [sentence] * len(snapshot.GRID_SIGMAS)
