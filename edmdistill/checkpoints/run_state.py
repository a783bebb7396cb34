"""Reading a run's saved states: what it resumes from, with the raw weights of its networks.

A state is a directory named by images seen, RUN/state/000000012800/, with NAME.safetensors for every group of tensors
and progress.json, which has the sha256 of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.layout import PROGRESS, images_of, is_state, saved_states
from edmdistill.checkpoints.store import load_tensors
from edmdistill.errors import CheckpointError


class IntervalProgress(msgspec.Struct, frozen=True):
    """Sums over the rounds since the last line of metrics.jsonl; see metrics.IntervalMeans."""

    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    rounds: int = 0
    seconds: float = 0.0
    before: float = 0.0


class HealthProgress(msgspec.Struct, frozen=True):
    """The state that monitors.Health resumes from.

    Attributes:
        streaks: for how many lines in a row each symptom has been seen.
        norms: the gradient norms of the healthy lines so far, by name.
        last_healthy: images seen at the newest line without symptoms.
        symptoms: those in the lines since the state before, or in the last line before that.
    """

    streaks: dict[str, int] = {}
    norms: dict[str, list[float]] = {}
    last_healthy: int = 0
    symptoms: list[str] = []


class Scale(msgspec.Struct, frozen=True):
    """The scale of a role's loss; see loss_scale.LossScale."""

    scale: float
    good: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """progress.json.

    Attributes:
        images: seen so far.
        sha256: of each safetensors file, by its stem.
    """

    images: int
    window: IntervalProgress
    scales: dict[str, Scale] = {}
    health: HealthProgress = HealthProgress()
    sha256: dict[str, str]


def read_progress(state: Path) -> Progress:
    """Returns the progress of a state.  Raises: ValueError: it is damaged.  OSError: it cannot be read."""
    try:
        progress = msgspec.convert(json.loads((state / PROGRESS).read_bytes()), Progress)
    except RecursionError as error:
        raise ValueError(f"{PROGRESS} is nested too deeply") from error
    if images_of(state) is None:
        raise ValueError(f"the folder was renamed from {progress.images:012d}")
    if progress.images != images_of(state) or not progress.sha256:
        raise ValueError(f"{PROGRESS} is of another state")
    return progress


def require_whole(state: Path) -> Progress:
    """Returns the progress of a state, after comparing every file with its sha256.

    Raises: ValueError: one differs.  OSError: one cannot be read.
    """
    progress = read_progress(state)
    for name, expected in progress.sha256.items():
        if sha256_file(state / f"{name}.safetensors") != expected:
            raise ValueError(f"{name}.safetensors is not what was written")
    return progress


def newest_whole_state(folder: Path, on_message: Callable[[str], object]) -> Path:
    """Returns the newest whole state of a run, and changes nothing.

    Args:
        folder: a run directory, or one of its states.
        on_message: called with a sentence about every state that is skipped.
    Raises: CheckpointError: there is none.
    """
    states = [folder] if is_state(folder) else saved_states(folder / "state")
    newest = newest_whole(states, lambda state, sentence: on_message(sentence))
    if newest is None:
        raise CheckpointError(
            f"{folder} has no intact state to read raw weights from: use a run directory that has one"
        )
    return newest


def newest_whole(states: Sequence[Path], on_broken: Callable[[Path, str], object]) -> Path | None:
    """Returns the last of some states, in ascending order, that is whole; None: none is.

    Args:
        on_broken: called with every state that is skipped, and a sentence on why.
    """
    for state in reversed(states):
        try:
            require_whole(state)
            return state
        except (OSError, ValueError) as error:
            then = "; the one before it is taken" if state != states[0] else ""
            on_broken(state, f"The state {state} is not whole ({error}){then}.")
    return None


def raw_weights(state: Path, role: str, mapped: bool = True) -> dict[str, Tensor]:
    """Returns the weights of a role that are being trained, by their names in FlowNetwork's network.

    Args:
        mapped: as for `load_tensors`.
    Raises: CheckpointError: the state has no such role, or has changed.
    """
    tensors, _ = load_tensors(state / f"{role}.safetensors", mapped=mapped)
    prefix = "weights.network."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
