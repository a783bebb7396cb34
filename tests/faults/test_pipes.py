"""A pipe in the place of a file: it is read where once is enough, and refused at once where it would be waited for."""

import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.cli import main

SUFFIXES = "npz", "npy", "pkl", "png", "pt", "toml", "zip", "tar", "safetensors"


@pytest.mark.parametrize(
    "words",
    [
        "eval {pipe}.npz --protocol pixels --ref digits",
        "eval {pipe}.npy --protocol pixels --ref digits",
        "eval {pipe}.zip --protocol pixels --ref digits",
        "eval digits --protocol pixels --ref {pipe}.npz",
        "eval digits --protocol pixels --ref {pipe}.pkl",
        "eval digits --protocol edm --ref digits --weights inception={pipe}.pt",
        "data stats digits {out}.npz --features dinov2 --weights dinov2={folder}.safetensors",
        "data prepare {pipe}.tar {out}.zip",
        "data prepare {folder}.idx/train-images-idx3-ubyte {out}.zip",
        "data prepare {folder}.parquet {out}.zip",
        "data stats {pipe}.zip {out}.npz",
        "sample {teacher} --seeds 0 --reference {pipe}.png --feature-net gray --out {out}.npz",
        "sample {teacher} --seeds 0 --reference {picture} --feature-net mask:{pipe}.png --out {out}.npz",
        "sample {teacher} --seeds 0 --reference {picture} --feature-net {pipe}.pt --out {out}.npz",
        "recipes validate {pipe}.toml",
        "sample {pipe}.safetensors --out {out}.npz",
        "sample {folder}.safetensors --out {out}.npz",
    ],
)
def test_a_pipe_is_refused(words: str, tmp_path: Path) -> None:
    teacher = tiny_generator(tmp_path / "teacher", "teacher")
    places = {"teacher": teacher, "out": tmp_path / "out", "pipe": tmp_path / "pipe", "folder": tmp_path / "folder"}
    for suffix in SUFFIXES:
        os.mkfifo(tmp_path / f"pipe.{suffix}")
    for inside in (
        "folder.safetensors/model.safetensors",
        "folder.safetensors/config.json",
        "folder.idx/train-images-idx3-ubyte",
        "folder.parquet/train.parquet",
    ):
        (tmp_path / inside).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / inside)
    places["picture"] = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(places["picture"])
    result = CliRunner().invoke(main, words.format(**places).split())
    assert result.exit_code == 2, result.output
    assert "is a pipe or a device: write its contents to a file, and use that" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    result = CliRunner().invoke(main, ["recipes", "validate", str(tmp_path / "folder.toml")])
    assert result.exit_code == 2
    assert "is a folder and no file: give a recipe's file" in result.stderr


def test_results_may_come_from_a_pipe(tmp_path: Path) -> None:
    """As by the shell's <(...): they are read once, from end to end."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["{}"])
    writer.start()
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "pipe")])
    writer.join()
    assert "holds no results (it has no list of them)" in result.stderr
