"""Saving and finding states. A state is whole or it is not there; `checkpoints.run_state` says what is in it.

Nothing random is in it: random numbers are a function of seed, round, turn and row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace
from torch import Tensor

from edmdistill.atomic import atomic_write, sha256_file
from edmdistill.checkpoints.layout import PROGRESS, saved_states
from edmdistill.checkpoints.run_state import Progress, read_progress, require_whole
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import CheckpointError, TrainingError


class State(NamedTuple):
    """progress: its sha256 are filled in when it is saved; tensors: groups of tensors by name, each a file."""

    progress: Progress
    tensors: Mapping[str, Mapping[str, Tensor]]


def save_state(folder: Path, state: State, keep: int, keep_every: int | None = None) -> Path:
    """Writes a state and removes those that need not be kept.  Returns: its directory.

    Args:
        keep, keep_every: see `kept`; the newest healthy state stays too.
    Raises: CheckpointError: the disk refuses; the states before are as they were.
    """
    target = state_path(folder, state.progress.images)
    with atomic_write(target) as new:
        new.mkdir()
        sums = {}
        for name, tensors in state.tensors.items():
            save_tensors(new / f"{name}.safetensors", tensors)
            sums[name] = sha256_file(new / f"{name}.safetensors")
        progress = msgspec.to_builtins(replace(state.progress, sha256=sums))
        (new / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    states = saved_states(folder)
    stay = kept([int(path.name) for path in states], keep, keep_every)
    healthy = newest_healthy(folder, state.progress.health.well)
    for path in states:
        if int(path.name) not in stay and path != healthy:
            shutil.rmtree(path)
    return target


def newest_healthy(folder: Path, well: int) -> Path | None:
    """Returns the newest state that was saved in good health, None where there is none.

    Args:
        well: images up to the newest line of metrics.jsonl in which nothing looked ill.
    """
    for path in reversed(saved_states(folder)):
        try:
            if int(path.name) <= well and not read_progress(path).health.found:
                return path
        except (OSError, ValueError):  # `newest_whole` says so when it comes to that
            continue
    return None


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
    """Returns the directory of the newest whole state, None where none was ever saved.

    Args:
        note: gets a sentence about every state that is not whole, is passed over, and is called NAME.broken from then
            on.
    Raises: TrainingError: there are states, and none is whole.
    """
    states = saved_states(folder)
    for path in reversed(states):
        try:
            require_whole(path)
            return path
        except (OSError, ValueError) as error:
            note(f"The state {path} is not whole ({error}); the run goes back to the one before it.")
            shutil.rmtree(path.with_suffix(".broken"), ignore_errors=True)
            path.rename(path.with_suffix(".broken"))
    if states:
        raise TrainingError(f"none of the states in {folder} is whole: start again in another --run-dir")
    return None


def read_state(path: Path) -> State:
    """Returns what `save_state` wrote.  Raises: TrainingError: it has changed since `newest_whole` named it."""
    try:
        progress = read_progress(path)
        return State(progress, {name: load_tensors(path / f"{name}.safetensors")[0] for name in progress.sha256})
    except (CheckpointError, OSError, ValueError) as error:
        raise TrainingError(f"the state {path} cannot be read: {error}; give the same command again") from error


def state_path(folder: Path, images: int) -> Path:
    """Returns the directory of the state after so many images."""
    return folder / f"{images:012d}"
