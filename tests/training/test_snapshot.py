"""Grids of samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
