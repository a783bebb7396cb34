"""Places where others may write: checkpoints and runs are refused before hours of work, with what helps."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_folders import untrained_run

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
        ("report run", "this user may not write in run: add --out FILE.html"),
    ],
)
def test_it_is_said_at_once(line: str, sentence: str, frozen: set[Path], tmp_path: Path) -> None:
    untrained_run(tmp_path / "run")
    frozen |= {tmp_path / "g", tmp_path / "run"}
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2, result.output
    assert sentence.format(tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train cosim none --data digits --recipe cosim/digits --run-dir {}", "Error: none does not exist"),
        (f"{EVAL} --metrics fd_digits --work {{}}", "nothing is resized"),
    ],
)
def test_a_folder_that_is_there_may_be_all_that_can_be_written(
    line: str, said: str, frozen: set[Path], tmp_path: Path
) -> None:
    """As a volume that is mounted in a container whose other folders are read-only."""
    (tmp_path / "volume").mkdir()
    frozen.add(tmp_path)
    assert said in CliRunner().invoke(main, line.format("volume").split()).output
    result = CliRunner().invoke(main, line.format("other").split())
    assert f"other cannot be written, for {tmp_path} is not a folder you may write to" in result.stderr
    frozen.add(tmp_path / "volume")
    result = CliRunner().invoke(main, line.format("volume").split())
    assert f"volume cannot be written, for {tmp_path}/volume is not a folder you may write to" in result.stderr


def test_a_cache_that_others_share(frozen: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may add to it, but one has made the folder of evaluations."""
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    frozen.add(tmp_path / "evaluations")
    result = CliRunner().invoke(main, EVAL.split())
    assert result.exit_code == 2
    assert (
        f"the cache {tmp_path}/evaluations cannot be written (it is read-only): set EDMDISTILL_CACHE" in result.stderr
    )
