"""The run directory: created whole or not at all, locked by one process, and never shared by two runs.

An empty folder that exists may be where a disk is mounted, or the working directory. It is not replaced but filled, and
is a run directory once it has recipe.resolved.json.

It holds recipe.toml, recipe.resolved.json, run.json, sessions.jsonl, metrics.jsonl, state/, samples/, x0/, ema/,
generator/, with [evaluation] best/, and with --profile profile/.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypedDict

from edmdistill.atomic import atomic_write, lock, reachable, remove_leftovers
from edmdistill.checkpoints.layout import RECIPE, RUN, TOML, saved_states
from edmdistill.errors import CheckpointError, TrainingError
from edmdistill.jsonl import append_line, read_lines, truncate_lines
from edmdistill.training.identity import require_same

SESSIONS, METRICS, LOCK = "sessions.jsonl", "metrics.jsonl", ".lock"
FOLDERS = "state", "samples", "x0", "ema"
LOST = "lost+found"
"""What an empty disk has of its own, as ext4."""
MetricsLine = dict[str, int | float]
"""A line of metrics.jsonl, with the key `images`."""


class DataIdentity(TypedDict):
    """The data in run.json, without the digests."""

    name: str
    images: int
    resolution: int
    channels: int
    classes: int


class RunIdentity(TypedDict):
    """The keys of every run.json."""

    data: DataIdentity


class RunDir:
    """An open run directory, from `open_run`.

    Args:
        owner: the ID of the process that has opened it, which is written there; None: not known.
    Attributes:
        locked: no other process can open it meanwhile.
    """

    def __init__(self, path: Path, owner: int | None = None, locked: bool = True) -> None:
        self.path, self.locked, self._owner = path, locked, owner
        self.state = path / "state"
        self.samples = path / "samples"
        self.x0 = path / "x0"
        self.ema = path / "ema"
        self.generator = path / "generator"
        self.best = path / "best"
        self._metrics = path / METRICS

    def is_there(self) -> bool:
        """Returns whether it is still where it was opened."""
        try:
            return self._owner is None or (self.path / LOCK).read_text() == str(self._owner)
        except (FileNotFoundError, NotADirectoryError):
            return (self.path / RUN).is_file()  # nobody needs the lock's file once it is open

    def require_there(self) -> None:
        """Raises: TrainingError: it was moved or removed, where a write would make it anew without its recipe."""
        if not self.is_there():
            raise TrainingError(
                f"{self.path} was moved or removed while it was trained in: move it back, and run the same command "
                "again"
            )

    def is_new(self) -> bool:
        """Returns whether nothing has been trained here yet."""
        return not self._metrics.exists() and not any(self.state.iterdir())

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        append_line(self._metrics, line)

    def lowest(self, key: str, score: Callable[[float], float]) -> float | None:
        """Returns the lowest score of a key's numbers in metrics.jsonl; None: there are none."""
        lines = read_lines(self._metrics, MetricsLine, ["images"])
        return min((score(line[key]) for line in lines if key in line), default=None)

    def log_session(self, session: Mapping[str, Any]) -> None:
        """Appends a line to sessions.jsonl: the environment that the run is computed in from here on."""
        append_line(self.path / SESSIONS, session)

    def truncate_after(self, images: int, on_message: Callable[[str], object]) -> None:
        """Drops lines of metrics.jsonl and files of ema/ that the run goes on to write.

        Args:
            images: up to which they stay.
            on_message: gets a sentence about every damaged line.
        """
        for file in self.ema.glob(f"{'[0-9]' * 12}-0.???.safetensors"):
            if int(file.name.partition("-")[0]) > images:
                file.unlink()
        truncate_lines(self._metrics, MetricsLine, lambda line: line["images"] <= images, ["images"], on_message)


@contextmanager
def open_run(path: Path, recipe: bytes, identity: Mapping[str, Any], recipe_text: str) -> Iterator[RunDir]:
    """Makes the directory of a run, or opens it again, and locks out every other process, if its disk has locks.

    Args:
        recipe: the resolved recipe, JSON.
        identity: what else must not change between a run and its resumption, as plain values.
        recipe_text: the recipe as its author wrote it.
    Raises: TrainingError: the directory is another run's, is no run directory, or is in use.
    """
    files = {
        TOML: recipe_text.encode(),
        RUN: json.dumps(identity, indent=2).encode() + b"\n",
        RECIPE: recipe,
    }
    was_there = path.is_dir()
    is_new = _create(path, files)
    _require_run(path)
    with (path / LOCK).open("a+") as file:
        locked = _lock(path, file)
        if require_same(path, files):
            with atomic_write(path / RECIPE) as new:
                new.write_bytes(recipe)
        for place in (path, *(path / name for name in FOLDERS)):
            place.mkdir(exist_ok=True)  # git and object stores keep no empty folder
            remove_leftovers(place)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        folder = RunDir(path, os.getpid(), locked)
        try:
            yield folder
        except BaseException:
            # A run that failed before it began must not block the next try.
            if is_new and folder.is_there() and folder.is_new():
                _remove(path, keep_folder=was_there)
            raise


def _create(path: Path, files: Mapping[str, bytes]) -> bool:
    """Makes the directory with its files.  Returns: False if there is one already."""
    try:
        if _is_blank(path):
            _fill(path, files)
        else:
            with atomic_write(path, replace=False) as new:
                new.mkdir()
                _fill(new, files)
        return True
    except (OSError, CheckpointError) as error:
        if path.is_dir() and not _is_blank(path):
            return False
        cause: BaseException | None = error
        while isinstance(cause, CheckpointError):  # of a file in the folder, and of the folder
            cause = cause.__cause__
        reason = getattr(cause, "strerror", None) or error
        raise TrainingError(f"{path} cannot be created: {reason}; use another --run-dir") from error


def _is_blank(path: Path) -> bool:
    """Returns whether it is a folder that is empty, or has only what `_fill` writes before the last file."""
    return path.is_dir() and all(
        entry.name in (TOML, RUN, LOST)
        or (entry.name in FOLDERS and not any(entry.iterdir()))
        or fnmatch(entry.name, ".*.new")  # of a write that was killed
        for entry in path.iterdir()
    )


def _fill(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files of a new run, the last of which makes it one."""
    for name in FOLDERS:
        (path / name).mkdir(exist_ok=True)
    for name, content in files.items():
        with atomic_write(path / name) as new:
            new.write_bytes(content)


def _remove(path: Path, keep_folder: bool) -> None:
    """Removes a run directory, or empties it, as far as the system lets it."""
    if not keep_folder:
        shutil.rmtree(path, ignore_errors=True)
        return
    for entry in path.iterdir():
        if entry.is_dir() and entry.name != LOST:
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_file():
            with suppress(OSError):
                entry.unlink()


def check_run(path: Path, recipe: bytes, identity: Mapping[str, Any]) -> None:
    """Checks that `open_run` would succeed, and changes nothing.  Raises: TrainingError: it would not."""
    if not path.exists() or _is_blank(path):
        real = Path(os.path.realpath(path))
        existing = next(folder for folder in (real, *real.parents) if os.path.lexists(folder))
        try:
            with TemporaryDirectory(prefix=".edmdistill-", dir=existing):  # the only way to know that it is allowed
                pass
        except OSError as error:
            raise TrainingError(f"{path} cannot be created: {error.strerror}; use another --run-dir") from error
        return
    if not path.is_dir():
        raise TrainingError(f"{path} cannot be created because a file of that name exists; use another --run-dir")
    _require_run(path)
    if (path / LOCK).exists():
        with (path / LOCK).open("r+") as file:
            _lock(path, file)
    require_same(path, {RECIPE: recipe, RUN: json.dumps(identity).encode()})


def _require_run(path: Path) -> None:
    """Raises: TrainingError: it is no run directory, or is one whose states are lost."""
    if not reachable(path / RECIPE).is_file():
        raise TrainingError(f"{path} exists and is not a run directory: use another --run-dir")
    state = path / "state"
    if saved_states(state):
        return
    # A run that was killed before its first state begins again. It has one grid at most: a GPU draws that of a state
    # while the state is written.
    grids = [grid for grid in (path / "samples").glob("*.png") if grid.stem.isdecimal() and int(grid.stem)]
    removed = (path / METRICS).exists() and not state.is_dir()
    if removed or len(grids) > 1 or any(state.glob("*.broken")):
        raise TrainingError(
            f"{path} was trained, but has no intact state from which it could go on: copy {state} from where it is "
            "whole, or use another --run-dir"
        )


def _lock(path: Path, file: IO[str]) -> bool:
    """Locks the file until it is closed.

    Returns: False on a file system without locks.
    Raises: TrainingError: another process has locked it.
    """
    locked = lock(file)
    if locked is False:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        raise TrainingError(f"{path} is in use by process {pid}: wait for it, or use another --run-dir")
    return locked is not None
