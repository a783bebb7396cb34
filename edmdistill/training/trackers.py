"""TensorBoard and Weights & Biases, which get a run's metrics and grids through accelerate's trackers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from edmdistill.atomic import atomic_write
from edmdistill.errors import TrainingError

INSTALL = {"tensorboard": "pip install 'edmdistill[tb]'", "wandb": "pip install wandb"}


def require_trackers(names: Sequence[str]) -> None:
    """Raises: TrainingError: a tracker is unknown or not installed."""
    for name in names:
        if name not in INSTALL:
            raise TrainingError(f"there is no tracker {name!r}: choose from {', '.join(INSTALL)}")
        if find_spec(name) is None:
            raise TrainingError(f"--log-with {name} needs a package that is not installed: {INSTALL[name]}")


class Trackers:
    """Trackers that are open.  opened: accelerate's own."""

    def __init__(self, opened: Sequence[Any]) -> None:
        self.opened = opened

    def log(self, line: Mapping[str, float]) -> None:
        """Takes a line of metrics.jsonl."""
        for tracker in self.opened:
            tracker.log(dict(line), step=int(line["images"]))

    def show(self, grids: Mapping[str, Path], images: int) -> None:
        """Takes PNGs by name, drawn after so many images."""
        for name, file in grids.items():
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            for tracker in self.opened:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=images, **layout)


@contextmanager
def trackers(names: Sequence[str], run_dir: Path, recipe: Mapping[str, Any], images: int) -> Iterator[Trackers]:
    """Opens trackers, on the main process.

    Args:
        names: tensorboard, into RUN/tensorboard; wandb, into a run of the project edmdistill, which is resumed.
        recipe: the resolved recipe, as plain values.
        images: seen so far; later points are dropped from TensorBoard, as from metrics.jsonl.
    Raises: TrainingError: a tracker cannot be opened.
    """
    folder = str(run_dir.resolve())
    options: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "tensorboard": (("tensorboard", folder), {"purge_step": images + 1}),
        "wandb": (
            ("edmdistill",),
            {
                "id": _wandb_id(run_dir) if "wandb" in names else None,
                "name": run_dir.name,
                "dir": folder,
                "resume": "allow",
                "config": dict(recipe),
            },
        ),
    }
    opened = []
    try:
        for name in names:
            positional, named = options[name]
            tracker = LOGGER_TYPE_TO_CLASS[name](*positional, **named)
            try:
                tracker.start()
            except Exception as error:  # the trackers' errors have no common class
                reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
                raise TrainingError(
                    f"--log-with {name} cannot be opened: {reason}; fix that, or leave it out"
                ) from error
            opened.append(tracker)
        yield Trackers(opened)
    finally:
        for tracker in opened:
            tracker.finish()


def _wandb_id(run_dir: Path) -> str:
    """Returns the run's id at Weights & Biases, drawn once and kept in its directory, wherever that is moved."""
    file = run_dir / "wandb-id.txt"
    if not file.exists():
        with atomic_write(file) as new:
            new.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
