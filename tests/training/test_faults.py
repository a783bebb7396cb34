"""What goes wrong in long runs: each fault ends in one sentence, and the same call goes on to the run without it."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edmdistill.errors import TrainingError
from edmdistill.methods import METHODS
from edmdistill.recipes import Recipe
from edmdistill.training import state
from edmdistill.training.engine import Machine
from edmdistill.training.loop import train
from edmdistill.training.run import Run

LIVES = Path(__file__).with_name("lives.py")
ROUNDS = 20


def live(recipe: Recipe, teacher: Path, run_dir: Path, *counts: int) -> list[str]:
    """How lives ended; see lives.py."""
    file = run_dir.with_suffix(".json")
    file.write_bytes(recipe.to_json())
    source = "-" if recipe.network else str(teacher)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(LIVES), str(file), source, str(run_dir), *map(str, counts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def what_it_left(run_dir: Path) -> dict[str, object]:
    """Everything in a run directory but what is about the process: times, memory, sessions."""
    found: dict[str, object] = {}
    for file in sorted(run_dir.rglob("*")):
        name = file.relative_to(run_dir).as_posix()
        if file.name == "sessions.jsonl":
            continue
        if file.suffix == ".safetensors":
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
        elif file.suffix == ".jsonl":
            lines = map(json.loads, file.read_text().splitlines())
            found[name] = [{k: v for k, v in line.items() if "second" not in k and k != "memory"} for line in lines]
        elif file.name == "progress.json":
            found[name] = {k: v for k, v in json.loads(file.read_text()).items() if k != "window"}
        elif file.is_file() and file.name != ".lock":
            found[name] = file.read_bytes()
        elif file.is_dir():
            found[name] = "folder"
    return found


@pytest.fixture
def whole(start: Callable[..., Run], tmp_path: Path) -> Callable[..., dict[str, object]]:
    """whole(method, **training): what a run leaves that nothing disturbs."""

    def leave(method: str, **training: object) -> dict[str, object]:
        assert train(start(method, **training), tmp_path / "whole", note=lambda sentence: None).finished
        return what_it_left(tmp_path / "whole")

    return leave


@pytest.mark.parametrize("method", sorted(METHODS))
def test_seven_rounds_kill_9_and_thirteen_more(method, start, whole, recipe, teacher, tmp_path):
    """All of 20 rounds, bit for bit, with dropout; killed between two states."""
    options = {"images": 8 * ROUNDS, "snapshot_every": 24, "log_every": 8}
    expected = whole(method, **options)
    touches = len(expected)  # of a run's first third; it is killed there
    assert live(recipe(method, **options), teacher, tmp_path / "run", touches) == ["killed"]
    assert not (tmp_path / "run/state/000000000160").exists()
    heard: list[str] = []
    assert train(start(method, **options), tmp_path / "run", note=heard.append).finished
    assert what_it_left(tmp_path / "run") == expected


@pytest.mark.parametrize("lives", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_touch_of_a_file(lives, whole, recipe, teacher, tmp_path):
    """Lives that are killed at random points, and a last one that is not, leave what one life leaves."""
    options = {"images": 8 * ROUNDS, "snapshot_every": 8, "log_every": 8}
    expected = whole("sid", **options)
    numbers = random.Random(lives)
    counts = [numbers.randint(1, 60) for _ in range(lives)]
    ends = live(recipe("sid", **options), teacher, tmp_path / "run", *counts, 0)
    assert ends == ["killed"] * lives + ["finished"]
    assert what_it_left(tmp_path / "run") == expected


def test_a_nan_in_the_data(start, whole, tmp_path):
    """It ends the run before it is in a weight; with sound data the same call goes on from the last state."""
    expected = whole("cosim", images=64, snapshot_every=16)
    run = start("cosim", images=64, snapshot_every=16)
    read, batches = run.dataset.tensors, []

    def poisoned(indices):
        x0, labels = read(indices)
        batches.append(x0)
        return (x0 * math.nan if len(batches) == 10 else x0), labels

    run.dataset.tensors = poisoned
    with pytest.raises(TrainingError, match=r"the loss of 8 of 8 samples, .* the last good state is .*000000000016;"):
        train(run, tmp_path / "run")
    assert train(start("cosim", images=64, snapshot_every=16), tmp_path / "run", note=lambda sentence: None).finished
    assert what_it_left(tmp_path / "run") == expected


def test_a_full_disk(start, whole, tmp_path, monkeypatch):
    """While the third state is written."""
    expected = whole("sid", images=64, snapshot_every=16)
    save, files = state.save_tensors, []

    def full(path, tensors):
        save(path, tensors)
        files.append(path)
        if len(files) == 8:  # of 3 a state
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "save_tensors", full)
    with pytest.raises(TrainingError) as error:
        train(start("sid", images=64, snapshot_every=16), tmp_path / "run")
    assert "000000000048 cannot be written: No space left on device, with " in str(error.value)
    assert f"make room, and the same command goes on from {tmp_path / 'run/state/000000000032'}" in str(error.value)
    monkeypatch.undo()
    assert train(start("sid", images=64, snapshot_every=16), tmp_path / "run", note=lambda sentence: None).finished
    assert what_it_left(tmp_path / "run") == expected


@pytest.mark.parametrize("file", ["generator.safetensors", "progress.json"])
def test_a_truncated_state(file, start, whole, tmp_path):
    expected = whole("sid", images=64, snapshot_every=16)
    run = start("sid", images=64, snapshot_every=16)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", on_round=lambda images, measures: interrupt(images == 56))
    newest = tmp_path / "run/state/000000000048" / file
    os.truncate(newest, newest.stat().st_size // 2)
    heard: list[str] = []
    resumed = start("sid", images=64, snapshot_every=16)
    assert train(resumed, tmp_path / "run", note=heard.append).finished
    assert heard[0].startswith(f"The state {newest.parent} is not whole")
    assert heard[1] == "Going on after 32 images."
    shutil.rmtree(newest.parent.with_suffix(".broken"))
    assert what_it_left(tmp_path / "run") == expected


def test_a_gpu_that_is_too_small(start, tmp_path):
    """A run that needs less memory goes on where the first one ended."""
    run = start("sid", images=64, snapshot_every=16)

    def too_large(images, measures):
        if images == 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run", on_round=too_large)
    assert str(error.value).startswith(
        "the GPU's memory is too small for this run (CUDA out of memory): add --micro-batch"
    )
    heard: list[str] = []
    smaller = start("sid", Machine("cpu", micro_batch=4, checkpointing=True), images=64, snapshot_every=16)
    assert train(smaller, tmp_path / "run", note=heard.append).finished
    assert heard[0] == "Going on after 32 images."


def interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt
