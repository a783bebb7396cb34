"""Checkpoints that may not be written are refused before hours of measuring, with what helps."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.cli import main

GENERATOR = Path(__file__).parents[1] / "checkpoints" / "format-1.0"
EVAL = "eval g --protocol digits --nfe 1 --n 4 --device cpu"
TUNE = "tune-schedule g --nfe 2 --metric fd_digits --n 4 --device cpu"


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Folders that may not be written, for root either."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GENERATOR, tmp_path / "g")
    folders: set[Path] = set()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in folders and access(path, mode))
    return folders


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (f"{EVAL} --save", "--save writes in {}/g, where this user may not write: use --out"),
        (TUNE, "this user may not write in {}/g: copy the checkpoint, or add --dry-run"),
    ],
)
def test_it_is_said_at_once(line: str, sentence: str, frozen: set[Path], tmp_path: Path) -> None:
    frozen.add(tmp_path / "g")
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2, result.output
    assert sentence.format(tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1
