"""What a command line asks before it samples: on which device, and what the classes are called."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, without_secrets
from edmdistill.networks.flow import Denoiser


def class_names(model: Generator | Denoiser) -> tuple[str, ...] | None:
    """Returns the names of a model's classes, if the checkpoint that it was loaded from holds any."""
    return model.config.label_names if isinstance(model, Generator) else model.label_names


def digest_of(source: str | Path) -> str:
    """The sha256 of a file, or the word itself where it names no file."""
    path = Path(source)
    return sha256_file(path) if path.is_file() else without_secrets(str(source))


def pick_device(name: str | None) -> torch.device:
    """Returns the device of that name, after a first tensor on it; see `named_device`.

    Raises: EdmDistillError: no such device is here, or torch cannot use it.
    """
    device = named_device(name)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise EdmDistillError(f"{device} cannot be used here ({reason}): give another --device") from error
    return device


def named_device(name: str | None) -> torch.device:
    """Returns the device of that name, cpu, cuda or cuda:N; of None, cuda, or cpu where there is no GPU.

    Raises: EdmDistillError: no such device is here.
    """
    known = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", "cpu" if name is None else name)
    if known is None:
        raise EdmDistillError(f"there is no device {name!r} here: give cpu, cuda, or cuda:N for GPU N, from 0")
    count = torch.cuda.device_count()
    if name is None:
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not count:
        raise EdmDistillError(
            f"{name} cannot be used, for torch finds no CUDA device here: give --device cpu, or see why by "
            "`edmdistill doctor`"
        )
    if known[1] is not None and int(known[1]) >= count:
        there = "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise EdmDistillError(f"there is no {name}: this machine has {there}")
    return torch.device(name)
