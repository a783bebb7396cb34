"""What a command line asks before it samples: on which device, and what the classes are called."""

from __future__ import annotations

from pathlib import Path

import torch

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.source import resolve
from edmdistill.checkpoints.store import CONFIG, read_config
from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import Denoiser


def class_names(model: Generator | Denoiser, source: str | Path) -> tuple[str, ...] | None:
    """The names of a model's classes, if the checkpoint that it was loaded from holds any."""
    if isinstance(model, Generator):
        return model.config.label_names
    path = resolve(source)
    folders = [folder for folder in (path / "generator", path) if (folder / CONFIG).is_file()]
    return read_config(folders[0]).label_names if folders else None


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the first GPU, or the CPU.

    Raises: EdmDistillError: torch cannot use it here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EdmDistillError(f"device {name!r} cannot be used here ({reason}): try cpu") from error
    return device
