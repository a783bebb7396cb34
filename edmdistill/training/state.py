"""Saving and finding states, which are written whole or not at all; see `checkpoints.run_state`.

A state holds no random state: random numbers are a function of seed, round, turn and row.
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
from edmdistill.checkpoints.run_state import Progress, newest_whole, read_progress
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import Damaged, TrainingError


class State(NamedTuple):
    """progress: its sha256 are filled in on saving; tensors: groups of tensors by name, each a file."""

    progress: Progress
    tensors: Mapping[str, Mapping[str, Tensor]]


def save_state(folder: Path, state: State, keep: int, keep_every: int | None = None) -> Path:
    """Writes a state and removes those that need not be kept.  Returns: its directory.

    Args:
        keep, keep_every: see `states_to_keep`; the newest healthy state is kept too.
    Raises: CheckpointError: the disk refuses; older states are unchanged.
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
    keep_images = states_to_keep([int(path.name) for path in states], keep, keep_every)
    healthy = newest_healthy(folder, state.progress.health.last_healthy)
    for path in states:
        if int(path.name) not in keep_images and path != healthy:
            shutil.rmtree(path)
    return target


def newest_healthy(folder: Path, last_healthy: int) -> Path | None:
    """Returns the newest state that was saved without symptoms; None: there is none.

    Args:
        last_healthy: images seen at the newest line of metrics.jsonl without symptoms.
    """
    for path in reversed(saved_states(folder)):
        try:
            if int(path.name) <= last_healthy and not read_progress(path).health.symptoms:
                return path
        except (OSError, ValueError):  # `resumable_state` reports it when the run resumes
            continue
    return None


def states_to_keep(images: Sequence[int], keep: int, keep_every: int | None) -> set[int]:
    """Returns the states to keep: the last `keep`, and the first after every `keep_every` images."""
    chosen = set(sorted(images)[-keep:])
    if keep_every is not None:
        first: dict[int, int] = {}
        for number in sorted(images):
            first.setdefault(number // keep_every, number)
        chosen |= {number for period, number in first.items() if period > 0}
    return chosen


def resumable_state(folder: Path, on_message: Callable[[str], object]) -> Path | None:
    """Returns the directory of the newest whole state; None: no state was ever saved.

    Args:
        on_message: gets a sentence about every state that is not whole. It is skipped, and renamed to NAME.broken.
    Raises: TrainingError: there are states, and none is whole.
    """
    states = saved_states(folder)

    def set_aside(state: Path, sentence: str) -> None:
        on_message(sentence)
        shutil.rmtree(state.with_suffix(".broken"), ignore_errors=True)
        state.rename(state.with_suffix(".broken"))

    newest = newest_whole(states, set_aside)
    if newest is None and states:
        raise TrainingError(f"no state in {folder} is intact: start again in another --run-dir")
    return newest


def read_state(path: Path) -> State:
    """Returns what `save_state` wrote.  Raises: TrainingError: it has changed since `resumable_state` named it."""
    try:
        progress = read_progress(path)
        return State(progress, {name: load_tensors(path / f"{name}.safetensors")[0] for name in progress.sha256})
    except (Damaged, OSError, ValueError) as error:
        reason = error.fault if isinstance(error, Damaged) else error
        raise TrainingError(f"the state {path} cannot be read: {reason}; run the same command again") from error


def state_path(folder: Path, images: int) -> Path:
    """Returns the directory of the state after so many images."""
    return folder / f"{images:012d}"
