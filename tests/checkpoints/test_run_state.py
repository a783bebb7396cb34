"""The newest whole state of a run."""

import hashlib
import json
from pathlib import Path

import pytest

from edmdistill.checkpoints.run_state import newest_whole, newest_whole_state, read_progress
from edmdistill.errors import CheckpointError


def state(run: Path, images: int) -> Path:
    folder = run / "state" / f"{images:012d}"
    folder.mkdir(parents=True)
    (folder / "generator.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    progress = {"images": images, "window": {}, "sha256": {"generator": digest}}
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def test_the_newest_whole_state_is_found_and_nothing_changes(tmp_path: Path) -> None:
    first, second, third = (state(tmp_path, images) for images in (8, 16, 24))
    assert newest_whole_state(tmp_path, pytest.fail) == third
    (third / "generator.safetensors").write_bytes(b"Weights")
    (second / "progress.json").write_text("{")
    messages: list[str] = []
    assert newest_whole_state(tmp_path, messages.append) == first
    assert [
        (str(path) in message, "the one before it is taken" in message)
        for path, message in zip((third, second), messages, strict=True)
    ] == [(True, True)] * 2
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        path.name for path in (first, second, third)
    ]


def test_without_a_whole_state_there_is_a_sentence(tmp_path: Path) -> None:
    (state(tmp_path, 8) / "generator.safetensors").unlink()
    messages: list[str] = []
    with pytest.raises(CheckpointError, match="has no intact state"):
        newest_whole_state(tmp_path, messages.append)
    assert len(messages) == 1
    assert "the one before" not in messages[0]
    assert newest_whole([], lambda path, sentence: pytest.fail(sentence)) is None


def test_a_state_under_another_name_is_refused(tmp_path: Path) -> None:
    moved = state(tmp_path, 8).rename(tmp_path / "state" / f"{16:012d}")
    with pytest.raises(ValueError, match="is of another state"):
        read_progress(moved)
    (moved / "progress.json").write_text('{"images": 16, "window": {}, "sha256": {}}')  # and of no file
    with pytest.raises(ValueError, match="is of another state"):
        read_progress(moved)
    (moved / "progress.json").write_text('{"images": ' + "[" * 10**6)
    with pytest.raises(ValueError, match=r"progress\.json is nested too deeply"):
        read_progress(moved)
