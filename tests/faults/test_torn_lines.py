"""Damaged logs and JSON files of a run directory: what is torn is dropped, what is bad is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.checkpoints.run_state import IntervalProgress, Progress
from edmdistill.errors import EdmDistillError, TrainingError
from edmdistill.jsonl import append_line, read_lines, truncate_lines
from edmdistill.report.summary import read_run
from edmdistill.training.run import Run
from edmdistill.training.run_dir import open_run
from edmdistill.training.session import train
from edmdistill.training.state import State, resumable_state, save_state

Numbers = dict[str, int | float]
BAD = [b"", b"{", b"[]", b"null", b'"images"', b'{"loss": 1}', b'{"images": "8"}', b"\xff\xfe", b"{}\r", b"[" * 10**5]


@given(st.lists(st.integers(0, 9)), st.binary().filter(lambda torn: b"\n" not in torn), st.integers(0, 9))
def test_a_torn_line_never_was(tmp_path_factory: pytest.TempPathFactory, values: list[int], torn: bytes, more: int):
    log = tmp_path_factory.mktemp("log") / "a.jsonl"
    for value in values:
        append_line(log, {"images": value})
    with log.open("ab") as file:
        file.write(torn)
    assert [line["images"] for line in read_lines(log, Numbers, on_message=pytest.fail)] == values
    append_line(log, {"images": more})
    assert [line["images"] for line in read_lines(log, Numbers, on_message=pytest.fail)] == [*values, more]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_passed_over_and_said(bad: bytes, tmp_path: Path):
    log, said = tmp_path / "a.jsonl", []
    log.write_bytes(b'{"images": 8}\n' + bad + b'\n{"images": 16}\n' + bad + b'\n{"images": 24}\n')
    assert [line["images"] for line in read_lines(log, Numbers, ["images"], said.append)] == [8, 16, 24]
    assert said == [f"{log}: line {number} is damaged and is skipped." for number in (2, 4)]
    truncate_lines(log, Numbers, lambda line: line["images"] <= 16, ["images"], said.append)
    assert log.read_bytes() == b'{"images": 8}\n' + bad + b'\n{"images": 16}\n'


def test_infinity_is_a_number(tmp_path: Path):
    """A gradient's norm is infinite where half precision overflows."""
    append_line(tmp_path / "a.jsonl", {"images": 8, "grad_norm/generator": float("inf")})
    assert read_lines(tmp_path / "a.jsonl", Numbers, on_message=pytest.fail)[0]["grad_norm/generator"] == float("inf")


@pytest.fixture(scope="module")
def finished(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(start("sid", images=32, snapshot_every=16, log_every=8), folder, on_message=lambda sentence: None)
    return folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "sessions.jsonl"])
def test_a_run_goes_on_and_is_reported(
    name: str, finished: Path, start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
):
    log = finished / name
    sound = log.read_bytes()
    log.write_bytes(sound.replace(b"\n", b"\nnot JSON\n", 1) + b'{"images": 3')
    try:
        before = read_run(finished)
        assert f"{log}: line 2 is damaged and is skipped." in capsys.readouterr().err
        assert train(
            start("sid", images=32, snapshot_every=16, log_every=8), finished, on_message=lambda said: None
        ).finished
        after = read_run(finished)
        assert (before.metrics, before.sessions) == (after.metrics, after.sessions)
        assert [line["images"] for line in after.metrics] == [8, 16, 24, 32]
    finally:
        log.write_bytes(sound)


GARBAGE = [b"", b"[]", b"null", b"3", b"\xff", b"{", b"[" * 10**5, b'{"images": 1']


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("name", ["run.json", "recipe.resolved.json"])
def test_what_a_run_is_cannot_be_read(name: str, content: bytes, finished: Path):
    file = finished / name
    sound = {name: (finished / name).read_bytes() for name in ("run.json", "recipe.resolved.json")}
    file.write_bytes(content)
    try:
        recipe, identity = sound["recipe.resolved.json"], json.loads(sound["run.json"])
        with (
            pytest.raises(TrainingError, match=rf"{name} is damaged, .* restore it from a backup, or use another"),
            open_run(finished, recipe, identity, ""),
        ):
            pass
        with pytest.raises(EdmDistillError) as error:
            read_run(finished)
        assert "\n" not in str(error.value)
        assert file.read_bytes() == content
    finally:
        file.write_bytes(sound[name])


PROGRESS: list[Callable[[dict[str, object]], object]] = [
    lambda own: [],
    lambda own: None,
    lambda own: {},
    lambda own: own | {"sha256": []},
    lambda own: own | {"sha256": {}},
    lambda own: own | {"window": 3},
    lambda own: own | {"window": {"rounds": "many"}},
    lambda own: own | {"images": 8},
    lambda own: {key: value for key, value in own.items() if key != "window"},
    lambda own: own | {"scales": [1]},
    lambda own: own | {"health": {"streaks": 3}},
]


@pytest.mark.parametrize("change", PROGRESS, ids=range(len(PROGRESS)))
def test_a_states_progress_that_is_none(change: Callable[[dict[str, object]], object], tmp_path: Path):
    """The state before it is taken, whatever the newest one's progress.json holds."""
    for images in (16, 32):
        progress = Progress(images=images, window=IntervalProgress(), sha256={})
        save_state(tmp_path, State(progress, {"generator": {"a": torch.zeros(1)}}), keep=2)
    file = tmp_path / "000000000032" / "progress.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    heard: list[str] = []
    newest = resumable_state(tmp_path, heard.append)
    assert newest is not None
    assert newest.name == "000000000016"
    assert "000000000032 is not whole" in heard[0]
