"""The run directory: made whole or not at all, used by one process, and never by two different runs.

It holds recipe.toml, recipe.resolved.json, run.json, sessions.jsonl, metrics.jsonl, state/, samples/, x0/, ema/ and
generator/.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypedDict

from edmdistill.atomic import atomic_write, remove_leftovers
from edmdistill.errors import CheckpointError, TrainingError
from edmdistill.jsonl import append_line, truncate_lines

RECIPE, RUN, SESSIONS, METRICS = "recipe.resolved.json", "run.json", "sessions.jsonl", "metrics.jsonl"
Measured = dict[str, int | float]
"""A line of metrics.jsonl, `images` among its keys."""


class DataFacts(TypedDict):
    """What run.json says of the data, beside what tells them from others of the same shape."""

    name: str
    images: int
    resolution: int
    channels: int
    classes: int


class RunFacts(TypedDict):
    """What every run.json holds."""

    data: DataFacts


FREE = {f"training.{key}" for key in ("keep", "keep_every", "log_every", "snapshot_every")} | {
    "ema.snapshot_every",
    "data.name",
}
"""What a run may go on with otherwise than it began: it changes nothing that is computed."""
TOTAL = "training.images"
"""May grow, where no schedule depends on it."""


class RunDir:
    """An open run directory; `open_run` gives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self.samples = path / "samples"
        self.x0 = path / "x0"
        self.ema = path / "ema"
        self.generator = path / "generator"
        self._metrics = path / METRICS

    def is_new(self) -> bool:
        """Whether nothing has been trained here yet."""
        return not self._metrics.exists() and not any(self.state.iterdir())

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        append_line(self._metrics, line)

    def begin(self, session: Mapping[str, Any]) -> None:
        """Appends a line to sessions.jsonl: by what the run is computed from here on."""
        append_line(self.path / SESSIONS, session)

    def forget_after(self, images: int, note: Callable[[str], object]) -> None:
        """Drops what metrics.jsonl and ema/ hold from beyond the position from which a run goes on.

        Args:
            note: gets a sentence about every damaged line.
        """
        for file in self.ema.glob(f"{'[0-9]' * 12}-0.???.safetensors"):
            if int(file.name.partition("-")[0]) > images:
                file.unlink()
        truncate_lines(self._metrics, Measured, lambda line: line["images"] <= images, ["images"], note)


@contextmanager
def open_run(path: Path, recipe: bytes, identity: Mapping[str, Any], recipe_text: str) -> Iterator[RunDir]:
    """Makes the directory of a run, or goes back to it, and keeps every other process out.

    Args:
        recipe: the resolved recipe, JSON.
        identity: what else must not change between a run and its resumption; plain values.
        recipe_text: the recipe as its author wrote it.
    Raises: TrainingError: the directory is another run's, or no run's, or in use.
    """
    files = {
        "recipe.toml": recipe_text.encode(),
        RECIPE: recipe,
        RUN: json.dumps(identity, indent=2).encode() + b"\n",
    }
    made = _create(path, files)
    _require_run(path)
    with (path / ".lock").open("a+") as lock:
        _lock(path, lock)
        if _require_same(path, files):
            with atomic_write(path / RECIPE) as new:
                new.write_bytes(recipe)
        for place in (path, path / "state", path / "samples", path / "x0", path / "ema"):
            remove_leftovers(place)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        folder = RunDir(path)
        try:
            yield folder
        except BaseException:
            if made and folder.is_new():  # a run that failed before it began leaves nothing in the way of the next try
                shutil.rmtree(path, ignore_errors=True)
            raise


def _create(path: Path, files: Mapping[str, bytes]) -> bool:
    """Makes the directory with its files.  Returns: False if there is one already."""
    try:
        with atomic_write(path, replace=False) as new:
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
            for folder in ("state", "samples", "x0", "ema"):
                (new / folder).mkdir()
        return True
    except (FileExistsError, CheckpointError) as error:
        if path.is_dir():
            return False
        reason = getattr(error if isinstance(error, OSError) else error.__cause__, "strerror", None) or error
        raise TrainingError(f"{path} cannot be made: {reason}; give another --run-dir") from error


def check_run(path: Path, recipe: bytes, identity: Mapping[str, Any]) -> None:
    """Finds out whether `open_run` would succeed, and changes nothing.  Raises: TrainingError: it would not."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        above = next(place for place in Path(os.path.realpath(path)).parents if os.path.lexists(place))
        try:
            with TemporaryDirectory(prefix=".edmdistill-", dir=above):  # the only way to know that the system lets us
                pass
        except OSError as error:
            raise TrainingError(f"{path} cannot be made: {error.strerror}; give another --run-dir") from error
        return
    if not path.is_dir():
        raise TrainingError(f"{path} cannot be made: a file is there; give another --run-dir")
    _require_run(path)
    if (path / ".lock").exists():
        with (path / ".lock").open("r+") as lock:
            _lock(path, lock)
    _require_same(path, {RECIPE: recipe, RUN: json.dumps(identity).encode()})


def _require_run(path: Path) -> None:
    if not (path / RECIPE).is_file():
        raise TrainingError(f"{path} exists and is no run directory: give another --run-dir")


def _lock(path: Path, lock: IO[str]) -> None:
    """Takes the lock that the file is, as long as it is open.  Raises: TrainingError: another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        who = lock.read().strip() or "unknown"
        raise TrainingError(f"{path} is in use by process {who}: wait for it, or give another --run-dir") from None


def _require_same(path: Path, files: Mapping[str, bytes]) -> bool:
    """Returns whether what is free to change has changed.  Raises: TrainingError: what is not free has."""
    before, now = ({name: _read_facts(path / name, text.get(name)) for name in (RECIPE, RUN)} for text in ({}, files))
    free = FREE
    if now[RECIPE].get("training.lr_decay") != "linear":
        old, new = (facts[RECIPE].get(TOTAL) for facts in (before, now))
        free = free | ({TOTAL} if isinstance(old, int) and isinstance(new, int) and new >= old else set())
    changed = [line for name in (RECIPE, RUN) for line in _differences(before[name], now[name], free)]
    if changed:
        raise TrainingError(
            f"{path} is the directory of another run; give another --run-dir, or the same recipe, teacher and data:",
            *changed,
        )
    return before[RECIPE] != now[RECIPE]


def _read_facts(file: Path, text: bytes | None = None) -> dict[str, Any]:
    """Returns a JSON object of a run directory, keys joined by dots.  text: the file's, if it is not to be read."""
    try:
        facts = json.loads(file.read_bytes() if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        facts = error
    if not isinstance(facts, dict):
        raise TrainingError(
            f"{file} is damaged, so that nothing says which run this is: put it back from a copy, or give another "
            f"--run-dir; {file.parent / 'generator'}, if it is there, can still be used"
        )
    return _flat(facts)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """A line for every key whose value is not the same in both, and is not free."""
    why = {
        TOTAL: "; it may only grow"
        if new.get("training.lr_decay") != "linear"
        else '; it may not grow, for training.lr_decay = "linear" depends on it'
    }
    return [
        f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now{why.get(key, '')}"
        for key in sorted((old.keys() | new.keys()).difference(free))
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def _flat(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}
