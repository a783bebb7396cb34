import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edmdistill.checkpoints.layout import saved_states
from edmdistill.checkpoints.run_state import IntervalProgress, Progress
from edmdistill.errors import CheckpointError, TrainingError
from edmdistill.training import state
from edmdistill.training.state import (
    State,
    newest_healthy,
    read_state,
    resumable_state,
    save_state,
    states_to_keep,
)


def load_state(folder, note):
    newest = resumable_state(folder, note)
    return None if newest is None else read_state(newest)


def make(images):
    tensors = {
        "generator": {"weights.a": torch.full((3,), float(images)), "step.a": torch.tensor(1.0)},
        "ema": {"a": torch.zeros(2, 2)},
    }
    return State(Progress(images=images, window=IntervalProgress(seconds=0.1), sha256={}), tensors)


def test_round_trip_and_keep(tmp_path):
    assert load_state(tmp_path, print) is None
    for images in (8, 16, 1000000):
        save_state(tmp_path, make(images), keep=2)
    assert [path.name for path in saved_states(tmp_path)] == ["000000000016", "000001000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000016", "000001000000"]
    loaded = load_state(tmp_path, pytest.fail)
    assert loaded.progress.images == 1000000
    assert loaded.progress.window == IntervalProgress(seconds=0.1)
    assert torch.equal(loaded.tensors["generator"]["weights.a"], torch.full((3,), 1e6))
    assert loaded.tensors["ema"]["a"].shape == (2, 2)


def test_the_same_position_is_saved_again(tmp_path):
    save_state(tmp_path, make(8), keep=2)
    save_state(tmp_path, make(8), keep=2)
    assert load_state(tmp_path, pytest.fail).progress.images == 8


@pytest.mark.parametrize("file", ["generator.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_broken_state_gives_way_to_the_one_before(tmp_path, file, damage):
    for images in (8, 16):
        save_state(tmp_path, make(images), keep=2)
    broken = tmp_path / "000000000016" / file
    whole = broken.read_bytes()
    broken.unlink() if damage == "missing" else broken.write_bytes(whole[: -5 if damage == "truncated" else 0])
    said = []
    assert load_state(tmp_path, said.append).progress.images == 8
    assert len(said) == 1
    assert "000000000016 is not whole" in said[0]
    assert (tmp_path / "000000000016.broken").is_dir()
    save_state(tmp_path, make(16), keep=2)
    assert load_state(tmp_path, pytest.fail).progress.images == 16


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_bit_of_a_state_may_change(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    for images in (8, 16):
        save_state(folder, make(images), keep=2)
    file = data.draw(st.sampled_from(sorted((folder / "000000000016").glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    said = []
    assert resumable_state(folder, said.append).name == "000000000008"
    assert file.name in said[0]


@given(st.lists(st.integers(1, 1000), min_size=1, unique=True), st.integers(1, 4), st.none() | st.integers(1, 300))
def test_what_is_kept(images, keep, every):
    """State by state as a run saves them: the last ones, and the first after every multiple, which once kept stays."""
    there, marks = set(), set()
    for number in sorted(images):
        there = states_to_keep([*there, number], keep, every)
        if every is not None and number // every not in {mark // every for mark in marks} | {0}:
            marks.add(number)
        assert there == set([n for n in sorted(images) if n <= number][-keep:]) | marks


def test_no_whole_state_is_an_error_and_no_fresh_start(tmp_path):
    save_state(tmp_path, make(8), keep=2)
    (tmp_path / "000000000008" / "ema.safetensors").unlink()
    with pytest.raises(TrainingError, match="no state in"):
        load_state(tmp_path, lambda sentence: None)


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    save_state(tmp_path, make(8), keep=1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_state(tmp_path, make(16), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000008"]


def test_a_state_that_cannot_be_read_is_not_called_healthy(tmp_path):
    for images in (8, 16):
        save_state(tmp_path, make(images), keep=2)
    assert newest_healthy(tmp_path, 100).name == "000000000016"
    (tmp_path / "000000000016/progress.json").write_text("{")
    assert newest_healthy(tmp_path, 100).name == "000000000008"
    assert newest_healthy(tmp_path, 7) is None


def test_a_state_that_is_damaged_while_it_is_read(tmp_path):
    """Nothing is loaded; the same command finds it, and goes back to the one before."""
    save_state(tmp_path, make(8), keep=2)
    newest = resumable_state(tmp_path, pytest.fail)
    (newest / "ema.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"the state .*000000000008 cannot be read: .*; run the same command again"):
        read_state(newest)
