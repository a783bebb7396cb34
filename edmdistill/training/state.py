"""Saved states: all that a run goes on from. A state is whole or it is not there.

A state is a directory named by images seen, state/000000012800/, with NAME.safetensors for every group of tensors and
progress.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from edmdistill.checkpoints.aside import aside
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import CheckpointError, TrainingError

PROGRESS = "progress.json"


class State(NamedTuple):
    """progress: plain values, `images` among them; tensors: groups of tensors by name, each a file."""

    progress: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save_state(folder: Path, state: State, keep: int) -> Path:
    """Writes a state and removes all but the last `keep`.  Returns its directory."""
    target = folder / f"{state.progress['images']:012d}"
    with aside(target) as new:
        new.mkdir()
        for name, tensors in state.tensors.items():
            save_tensors(new / f"{name}.safetensors", tensors)
        progress = state.progress | {"files": list(state.tensors)}
        (new / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_state(folder: Path, note: Callable[[str], object]) -> State | None:
    """The newest whole state, or None where none was ever saved.

    Args:
        note: hears of every state that is not whole, is passed over, and is called NAME.broken from then on.
    Raises: TrainingError: there are states, and none is whole.
    """
    for rest in folder.glob(".*"):  # of a process that was killed while it wrote
        shutil.rmtree(rest)
    states = saved_states(folder)
    for path in reversed(states):
        try:
            progress = json.loads((path / PROGRESS).read_bytes())
            files = {name: path / f"{name}.safetensors" for name in progress["files"]}
            return State(progress, {name: load_tensors(file)[0] for name, file in files.items()})
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            note(f"The state {path} is not whole ({error}); the run goes back to the one before it.")
            shutil.rmtree(path.with_suffix(".broken"), ignore_errors=True)
            path.rename(path.with_suffix(".broken"))
    if states:
        raise TrainingError(f"none of the states in {folder} is whole: start again in another --run-dir")
    return None


def saved_states(folder: Path) -> list[Path]:
    """The directories of the saved states, the oldest first."""
    return sorted(path for path in folder.iterdir() if path.name.isdecimal())
