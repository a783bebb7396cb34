"""What a run that went wrong advises is done here, and works."""

import os
import re
import shlex
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from PIL import Image

from edmdistill.checkpoints.config import Guidance
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.cli import main
from edmdistill.data import datasets
from edmdistill.data.order import indices
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.networks.surgery.rebuild import add_guidance
from edmdistill.recipes.schema import Recipe
from edmdistill.training import monitors
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run
from edmdistill.training.session import train


def test_an_image_that_cannot_be_read(
    recipe: Callable[..., Recipe], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Put back, the run goes on; left out, it is another set."""
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)  # images are read when they are wanted
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "dataset.json").write_text(
        f'{{"labels": [{", ".join(f"""["{number:02d}.png", {number % 10}]""" for number in range(40))}]}}'
    )
    for number in range(40):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number:02d}.png")

    def begin() -> Run:
        made = recipe("cosim", images=80, snapshot_every=8)
        return prepare(made, data=folder, teacher=teacher, machine=Machine("cpu"))

    run, broken = begin(), folder / f"{int(indices(0, 20, 1, 40)):02d}.png"
    sound = broken.read_bytes()
    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run", on_round=lambda images, measures: broken.write_bytes(sound[:40]), on_message=str)
    assert f"{broken.name} is not a readable image" in str(error.value)
    assert "if it has changed since the run began, restore it and run the same command again" in str(error.value)
    broken.write_bytes(sound)
    heard: list[str] = []
    assert train(begin(), tmp_path / "run", on_message=heard.append).finished
    assert heard[0] == "Going on after 8 images."


@pytest.mark.parametrize("method", ["cosim", "diffusion"])
def test_back_to_the_last_good_state(
    method: str,
    recipe: Callable[..., Recipe],
    start: Callable[..., Run],
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def check(self: monitors.Health, line: dict[str, float]) -> list[monitors.Alarm]:
        if line["images"] < 24:
            self.last_healthy = int(line["images"])
            return []
        self._seen = {"collapse"}
        return [monitors.Alarm("collapse", "It is ill.")]

    monkeypatch.setattr(monitors.Health, "check", check)
    with pytest.raises(TrainingError) as error:
        train(
            start(method, images=80, log_every=8, snapshot_every=8),
            tmp_path / "a run",
            stop_on={"collapse"},
            on_message=str,
        )
    state = tmp_path / "a run/state/000000000016"
    how = f"by --init '{state}'" if method == "cosim" else f"as TEACHER, '{state}'"
    assert str(error.value).endswith(f"in another --run-dir, from its weights {how}, or from the start")
    source, init = (teacher, state) if method == "cosim" else (state, None)
    run = prepare(recipe(method, lr=1e-3), data="digits", teacher=source, machine=Machine("cpu"), init=init)
    monkeypatch.undo()
    assert train(run, tmp_path / "again", on_message=str).finished


def test_files_have_the_mode_that_the_umask_gives(start: Callable[..., Run], tmp_path: Path):
    before = os.umask(0o027)
    try:
        train(start("sid", images=8, snapshot_every=8), tmp_path / "run", on_message=str)
    finally:
        os.umask(before)
    for file in tmp_path.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o750 if file.is_dir() else 0o640), file


TRAIN = "train {0} digits --data digits --recipe {0}/digits --run-dir run --device cpu --dry-run"


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that reads a weight of guidance."""
    folder = tmp_path_factory.mktemp("guided") / "generator"
    flow, config = load_flow("digits")
    config = replace(config, stage="generator", method="scd", guidance=Guidance("classes", (1.0, 2.5)))
    save_checkpoint(folder, add_guidance(flow), config)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        f"{TRAIN.format('cosim')} --stop-on quality",
        f"{TRAIN.format('cosim')} --set evaluation.protocol=digits --set evaluation.every=32000",
        f"{TRAIN.format('scd')} --init GUIDED --force-guidance",
    ],
    ids=["quality", "every", "guidance"],
)
def test_options_that_are_advised(words: str, guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are added as advised, and numbers replaced, until the command runs."""
    monkeypatch.chdir(tmp_path)
    command = words.replace("GUIDED", str(guided))
    for _ in range(3):
        result = CliRunner().invoke(main, shlex.split(command))
        if result.exit_code == 0:
            return
        assert result.exit_code == 2
        if every := re.search(r"every = (\d+) must .* such as (\d+)$", result.stderr):
            command = command.replace(every[1], every[2])
        command += " ".join(["", *re.findall(r"--set (?:'[^']*'|[^\s,]*)", result.stderr)])
    pytest.fail(result.stderr)


@pytest.mark.parametrize("method", ["cosim", "scd"])
def test_a_generator_that_cannot_be_started_from(method: str, guided: Path, tmp_path: Path) -> None:
    """The advice names no option that the method lacks."""
    words = [*TRAIN.format(method).split(), "--init", str(guided), "--set", "method.allow_edm_time=false"]
    result = CliRunner().invoke(main, words[:-2] if method == "cosim" else words)
    assert result.exit_code == 2
    assert ("method.guidance" in result.stderr) == (method == "scd")
    assert result.stderr.endswith("leave --init out\n")


def test_a_second_stage_of_a_generator_with_a_range_of_guidance(guided: Path) -> None:
    result = CliRunner().invoke(main, TRAIN.format("tcm").replace(" digits ", f" {guided} ", 1).split())
    assert result.exit_code == 2
    assert "which a second stage cannot: train it with --set 'method.guidance=[1,1]'" in result.stderr
