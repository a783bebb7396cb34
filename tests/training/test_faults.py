"""What goes wrong in long runs: each fault ends in one sentence, and the same call goes on to the run without it."""

import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ALL_METHODS

from edmdistill.errors import CheckpointError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.training import session, state
from edmdistill.training.resume import resume
from edmdistill.training.run_dir import RunDir
from edmdistill.training.session import train

EIGHT_ROUNDS = {"images": 64, "snapshot_every": 24, "log_every": 16}
"""States fall within the windows of metrics.jsonl, and windows within the states."""


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
            progress = json.loads(file.read_text())
            progress["window"] = {k: v for k, v in progress["window"].items() if k not in ("seconds", "before")}
            found[name] = progress
        elif file.is_file() and file.name != ".lock":
            found[name] = file.read_bytes()
        elif file.is_dir():
            found[name] = "folder"
    return found


@pytest.mark.parametrize("method", ALL_METHODS)
def test_resumed_is_never_interrupted(method, start, whole, tmp_path):
    """8 rounds = 5 + resume + 3, bit for bit on one machine, dropout and all."""
    (run, straight), broken = whole(method, **EIGHT_ROUNDS), tmp_path / "broken"

    def interrupt(images, measures):
        if images == 5 * 8:
            signal.raise_signal(signal.SIGINT)

    assert train(start(method, **EIGHT_ROUNDS), broken, on_round=interrupt) == (False, 40)
    resumed = start(method, **EIGHT_ROUNDS)
    assert train(resumed, broken) == (True, 64)
    for group, tensors in run.state().items():
        for name, tensor in resumed.state()[group].items():
            assert torch.equal(tensor, tensors[name]), f"{group} {name}"
    for run_dir in straight, broken:
        names = [path.name for path in sorted((run_dir / "state").iterdir())]
        assert names[-2:] == ["000000000048", "000000000064"]  # before them, perhaps, the newest healthy one
    assert metrics(straight) == metrics(broken)
    assert [line["images"] for line in metrics(broken)] == list(range(16, 65, 16))
    one, two = (load_file(path / "generator" / "model.safetensors") for path in (straight, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for picture in ("samples/000000064.png", "x0/000000064.png"):
        assert (straight / picture).read_bytes() == (broken / picture).read_bytes()


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "memory")} for line in lines]


FEW = {"cosim", "diffusion"}
"""Between them: two networks, and no teacher; ctm, with its discriminator, is resumed in the test above."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in sorted(METHODS)]
)
def test_killed_between_two_states(method, start, whole, recipe, live, tmp_path):
    """All of 8 rounds, bit for bit on one machine, with dropout."""
    expected = what_it_left(whole(method, **EIGHT_ROUNDS)[1])
    run_dir = tmp_path / "run"
    assert live(recipe(method, **EIGHT_ROUNDS), run_dir, "000000000048") == ["killed"]
    assert [path.name for path in (run_dir / "state").iterdir()] == ["000000000024"]
    heard: list[str] = []
    assert train(start(method, **EIGHT_ROUNDS), run_dir, on_message=heard.append).finished
    assert heard[0] == "Going on after 24 images."
    assert what_it_left(run_dir) == expected


@pytest.mark.parametrize("due", ["log_every", "snapshot_every"])
def test_a_run_that_is_moved_while_it_is_trained_in_is_not_made_anew(due, start, tmp_path):
    options = {"images": 32, "log_every": 80, "snapshot_every": 80} | {due: 16}
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def move(images, measures):
        if images == 8:
            run_dir.rename(elsewhere)
            run_dir.mkdir()
            (run_dir / "notes.txt").write_text("mine")

    with pytest.raises(TrainingError, match="run was moved or removed while it was trained in: move it back"):
        train(start("diffusion", **options), run_dir, on_round=move, on_message=str)
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]
    (run_dir / "notes.txt").unlink()
    run_dir.rmdir()
    elsewhere.rename(run_dir)
    assert train(start("diffusion", **options), run_dir, on_message=str).finished


def test_nobody_needs_the_file_of_the_lock(start, tmp_path):
    remove = (tmp_path / "run/.lock").unlink
    options = {"images": 24, "snapshot_every": 16}
    assert train(
        start("diffusion", **options), tmp_path / "run", on_round=lambda *_: remove(missing_ok=True), on_message=str
    ).finished


def test_a_disk_without_locks_is_said_and_trained_on(start, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    heard: list[str] = []
    for _ in range(2):
        assert train(start("diffusion"), tmp_path / "run", on_message=heard.append).finished
    sentence = f"{tmp_path}/run is on a disk without locks: train in it by one command at a time."
    assert heard.count(sentence) == 2


@pytest.mark.parametrize(("lives", "rounds"), [(5, 8), pytest.param(50, 20, marks=pytest.mark.slow)])
def test_killed_at_any_touch_of_a_file(lives, rounds, whole, recipe, live, tmp_path):
    """Lives that are killed at random points, and a last one that is not, leave what one life leaves."""
    options = {"images": 8 * rounds, "snapshot_every": 8, "log_every": 8}
    expected = what_it_left(whole("sid", **options)[1])
    numbers = random.Random(lives)
    counts = [numbers.randint(1, 60) for _ in range(lives)]
    assert live(recipe("sid", **options), tmp_path / "run", *counts, 0) == ["killed"] * lives + ["finished"]
    assert what_it_left(tmp_path / "run") == expected


def test_a_nan_in_the_data(start, whole, tmp_path):
    """It ends the run before it is in a weight; with sound data the same call goes on from the last state."""
    expected = what_it_left(whole("cosim", images=64, snapshot_every=16)[1])
    run = start("cosim", images=64, snapshot_every=16)
    read, batches = run.dataset.tensors, []

    def poisoned(indices):
        x0, labels = read(indices)
        batches.append(x0)
        return (x0 * math.nan if len(batches) == 10 else x0), labels

    run.dataset.tensors = poisoned
    with pytest.raises(TrainingError, match=r"the data hold NaN or infinity, first digit \d+ of digits; give sound"):
        train(run, tmp_path / "run")
    assert train(
        start("cosim", images=64, snapshot_every=16), tmp_path / "run", on_message=lambda sentence: None
    ).finished
    assert what_it_left(tmp_path / "run") == expected


def test_a_full_disk(start, whole, tmp_path, monkeypatch):
    """While the third state is written."""
    expected = what_it_left(whole("sid", images=64, snapshot_every=16)[1])
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
    assert f"free some space, and run the same command to resume from {tmp_path / 'run/state/000000000032'}" in str(
        error.value
    )
    monkeypatch.undo()
    assert train(
        start("sid", images=64, snapshot_every=16), tmp_path / "run", on_message=lambda sentence: None
    ).finished
    assert what_it_left(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EFBIG, "raise the limit of a file's size (ulimit -f)"),
        (errno.EMFILE, "raise the limit of open files (ulimit -n)"),
        (errno.EDQUOT, "free some of it"),
    ],
)
def test_a_limit_is_no_full_disk(start, tmp_path, monkeypatch, number, advice):
    save, files = state.save_tensors, []

    def refused(path, tensors):
        files.append(path)
        if len(files) > 3:  # a state
            raise CheckpointError("of a file") from OSError(number, os.strerror(number))
        save(path, tensors)

    monkeypatch.setattr(state, "save_tensors", refused)
    with pytest.raises(TrainingError) as error:
        train(start("sid", images=32, snapshot_every=16), tmp_path / "run")
    newest = tmp_path / "run/state/000000000016"
    assert str(error.value).endswith(f"; {advice}, and run the same command to resume from {newest}")


def test_a_disk_that_became_read_only(start, tmp_path, monkeypatch):
    def refused(path, tensors):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(state, "save_tensors", refused)
    sentence = r"/state/000000000016 cannot be written: Read-only file system; make the disk writable, and run "
    with pytest.raises(TrainingError, match=sentence):
        train(start("sid", images=16, snapshot_every=16), tmp_path / "run")


@pytest.mark.parametrize("file", ["generator.safetensors", "progress.json"])
def test_a_truncated_state(file, start, whole, tmp_path):
    expected = what_it_left(whole("sid", images=64, snapshot_every=16)[1])
    run = start("sid", images=64, snapshot_every=16)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", on_round=lambda images, measures: interrupt(images == 56))
    newest = tmp_path / "run/state/000000000048" / file
    os.truncate(newest, newest.stat().st_size // 2)
    heard: list[str] = []
    resumed = start("sid", images=64, snapshot_every=16)
    assert train(resumed, tmp_path / "run", on_message=heard.append).finished
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
    assert str(error.value).startswith("this run does not fit in GPU memory (CUDA out of memory): add --micro-batch")
    heard: list[str] = []
    smaller = start("sid", Machine("cpu", micro_batch=4, checkpointing=True), images=64, snapshot_every=16)
    assert train(smaller, tmp_path / "run", on_message=heard.append).finished
    assert heard[0] == "Going on after 32 images."


def test_a_plan_that_does_not_fit(start, tmp_path, monkeypatch):
    """The largest micro-batch that does is said; options that --fit chooses are not advised."""
    monkeypatch.setattr(session, "settle_micro_batch", lambda run: 4)
    heard: list[str] = []

    def too_large(images, measures):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    run = start("sid", Machine("cpu", 8, planned=True))
    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run", on_round=too_large, on_message=heard.append)
    assert "Micro-batches of 4 images fit, those of the plan do not." in heard
    assert "(CUDA out of memory): give --fit less memory in the same command, which resumes" in str(error.value)


def test_a_state_of_another_run_is_not_loaded(start, whole):
    folder = whole("sid", images=64, snapshot_every=16)[1]
    with pytest.raises(TrainingError, match=r"the state .*000000000064 is from another run, although the recipe and"):
        resume(start("cosim"), RunDir(folder), pytest.fail)


def test_a_run_that_fails_at_once_has_no_state_to_go_back_to(start, tmp_path):
    run = start("sid")
    with torch.no_grad():
        run.networks["auxiliary"].network.out_conv.weight.fill_(math.nan)
    with pytest.raises(
        TrainingError, match=r"; no state was saved before it; try a lower training\.lr in another --run-"
    ):
        train(run, tmp_path / "run")


@pytest.mark.parametrize("error", [RuntimeError("of ours"), OSError(errno.EACCES, "Permission denied")])
def test_faults_that_are_not_the_users_keep_their_traceback(error, start, tmp_path):
    def fail(images, measures):
        raise error

    with pytest.raises(type(error)) as raised:
        train(start("sid"), tmp_path / "run", on_round=fail)
    assert raised.value is error


def interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt
