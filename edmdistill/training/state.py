"""Saved states: all that a run goes on from. A state is whole or it is not there.

A state is a directory named by images seen, state/000000012800/, with NAME.safetensors for every group of tensors and
progress.json, which has the sha256 of each of them. Nothing random is in it: random numbers are a function of seed,
round, turn and row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from edmdistill.atomic import atomic_write, sha256_file
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import CheckpointError, TrainingError

PROGRESS = "progress.json"


class State(NamedTuple):
    """progress: plain values, `images` among them; tensors: groups of tensors by name, each a file."""

    progress: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save_state(folder: Path, state: State, keep: int, keep_every: int | None = None) -> Path:
    """Writes a state and removes those that need not be kept.  Returns: its directory.

    Args:
        keep, keep_every: see `kept`.
    Raises: CheckpointError: the disk refuses; the states before are as they were.
    """
    target = state_path(folder, state.progress["images"])
    with atomic_write(target) as new:
        new.mkdir()
        sums = {}
        for name, tensors in state.tensors.items():
            save_tensors(new / f"{name}.safetensors", tensors)
            sums[name] = sha256_file(new / f"{name}.safetensors")
        progress = state.progress | {"sha256": sums}
        (new / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    states = saved_states(folder)
    stay = kept([int(path.name) for path in states], keep, keep_every)
    for path in states:
        if int(path.name) not in stay:
            shutil.rmtree(path)
    return target


def kept(images: Sequence[int], keep: int, keep_every: int | None) -> set[int]:
    """Which of the states stay: the last `keep`, and of every `keep_every` images the first after them."""
    stay = set(sorted(images)[-keep:])
    if keep_every is not None:
        first: dict[int, int] = {}
        for number in sorted(images):
            first.setdefault(number // keep_every, number)
        stay |= {number for period, number in first.items() if period > 0}
    return stay


def newest_whole(folder: Path, note: Callable[[str], object]) -> Path | None:
    """The directory of the newest whole state, or None where none was ever saved.

    Args:
        note: hears of every state that is not whole, is passed over, and is called NAME.broken from then on.
    Raises: TrainingError: there are states, and none is whole.
    """
    states = saved_states(folder)
    for path in reversed(states):
        try:
            for name, expected in json.loads((path / PROGRESS).read_bytes())["sha256"].items():
                if sha256_file(path / f"{name}.safetensors") != expected:
                    raise ValueError(f"{name}.safetensors is not what was written")
            return path
        except (OSError, ValueError, KeyError, AttributeError) as error:
            note(f"The state {path} is not whole ({error}); the run goes back to the one before it.")
            shutil.rmtree(path.with_suffix(".broken"), ignore_errors=True)
            path.rename(path.with_suffix(".broken"))
    if states:
        raise TrainingError(f"none of the states in {folder} is whole: start again in another --run-dir")
    return None


def read_state(path: Path) -> State:
    """What `save_state` wrote there.  Raises: TrainingError: it has changed since `newest_whole` named it."""
    try:
        progress = json.loads((path / PROGRESS).read_bytes())
        return State(progress, {name: load_tensors(path / f"{name}.safetensors")[0] for name in progress["sha256"]})
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the state {path} cannot be read: {error}; give the same command again") from error


def state_path(folder: Path, images: int) -> Path:
    """The directory of the state after so many images."""
    return folder / f"{images:012d}"


def saved_states(folder: Path) -> list[Path]:
    """The directories of the saved states, the oldest first."""
    return sorted(path for path in folder.iterdir() if path.name.isdecimal())
