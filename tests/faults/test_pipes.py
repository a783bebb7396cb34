"""A pipe given for a file would be waited for for ever: every command that cannot read one refuses it at once."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.cli import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("eval {pipe}.npz --protocol pixels --ref digits", "is a pipe or a device: write its contents to a file"),
        ("eval {pipe}.npy --protocol pixels --ref digits", "is a pipe or a device: write its contents to a file"),
        (
            "sample {teacher} --seeds 0 --reference {pipe}.png --feature-net gray --out {out}.npz",
            "cannot be read as a picture (it is not a file): use a PNG",
        ),
        (
            "sample {teacher} --seeds 0 --reference {picture} --feature-net mask:{pipe}.png --out {out}.npz",
            "cannot be read as a picture (it is not a file): use a PNG",
        ),
        ("recipes validate {pipe}.toml", "is a pipe or a device and no file: give a recipe's file"),
        ("recipes validate {folder}.toml", "is a folder and no file: give a recipe's file"),
        ("sample {pipe}.safetensors --out {out}.npz", "a pipe or a device: write its contents to a file, and use that"),
    ],
)
def test_a_pipe_is_refused(words: str, sentence: str, tmp_path: Path) -> None:
    teacher = tiny_generator(tmp_path / "teacher", "teacher")
    places = {"teacher": teacher, "out": tmp_path / "out", "pipe": tmp_path / "pipe", "folder": tmp_path / "folder"}
    for suffix in ("npz", "npy", "png", "toml", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / "folder.toml").mkdir()
    places["picture"] = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(places["picture"])
    result = CliRunner().invoke(main, words.format(**places).split())
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
