"""From what a user names to a model that can be sampled."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoints.convert import load_denoiser, load_generator
from ..checkpoints.source import resolve
from ..checkpoints.store import CONFIG, CheckpointConfig, Generator, read_config
from ..errors import EdmDistillError
from ..networks.preconditioning import Denoiser


def load_model(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Generator | Denoiser, CheckpointConfig | None]:
    """The generator or the teacher at a source, and its configuration if it is a checkpoint of ours.

    Args:
        source: what load_denoiser and load_generator take, or a run directory, which means its generator.
    Raises: EdmDistillError: nothing there, a run that has left no generator yet, or a damaged checkpoint.
    """
    path = resolve(source)
    if (path / "recipe.toml").is_file():
        path = path / "generator"
        if not (path / CONFIG).is_file():
            raise EdmDistillError(f"{source} is a run without a generator as yet: wait for its end, or resume it")
    if not path.is_dir():
        return load_denoiser(path, device, dtype), None
    config = read_config(path)
    load = load_generator if config.stage == "generator" else load_denoiser
    return load(path, device, dtype), config


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
