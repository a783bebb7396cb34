"""`edmdistill data prepare`: the command, its tables, and what it says after an interruption."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from picture_files import encoded, write_folder

from edmdistill.cli import main
from edmdistill.cli.data_prepare import LABELS, SPLITS, TRANSFORMS
from edmdistill.data import parquet, prepare, sources, transforms

PICTURES = {f"{'ab'[i % 2]}/{i:02}.png": encoded(i, 12, 9) for i in range(20)}


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["data", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_its_tables_are_the_librarys() -> None:
    assert (set(TRANSFORMS), set(LABELS)) == (set(transforms.TRANSFORMS), set(sources.LABEL_RULES))
    assert set(SPLITS) == set(parquet.SPLITS)


def test_from_pictures_to_a_set_that_is_read(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    said = run("prepare", source, out, "--resolution", "8", "--transform", "center-crop", "--quiet")
    assert "20 of 8x8, RGB" in said
    assert "center-crop: the largest square in the middle; filter lanczos" in said
    found = json.loads(run("inspect", out, "--json"))
    assert (found["images"], found["resolution"], [entry["images"] for entry in found["classes"]]) == (20, 8, [10, 10])


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    command = "prepare", source, out, "--resolution", "8x8", "--workers", "1"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare.EdmZip, "finish", interrupt)
        assert "the same command goes on from here" in run(*command, code=130)
    assert not out.exists()
    run(*command)
    assert out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolution", "many"], "'many' is no size"),
        (["--resolution", "0"], "'0' is no size"),
        (["--resolution", "64x"], "'64x' is no size"),
        (["--resolution", "64x64x64"], "'64x64x64' is no size"),
        (["--resolution", "9" * 10_000], "is no size"),
        (["--resolution", "60", "--transform", "center-crop"], "60 is not a power of two up to 4096"),
        (["--resolution", "64x32", "--transform", "center-crop"], "64x32 is not square, and images of a data set are"),
        (["--transform", "center-crop"], "center-crop needs a size; give --resolution"),
        (["--transform", "center-crob"], "did you mean 'center-crop'"),
    ],
)
def test_options_that_mean_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in run("prepare", tmp_path, tmp_path / "out.zip", *words, code=2)
    assert "must end in .zip" in run("prepare", tmp_path, tmp_path / "out", code=2)
