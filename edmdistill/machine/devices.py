"""Devices by the name that a command line gives."""

from __future__ import annotations

import os
import re
from typing import Literal

import torch

from edmdistill.errors import EdmDistillError, counted
from edmdistill.transfer import is_gpu


def pick_device(name: str | None) -> torch.device:
    """Returns the device of that name, after a first tensor on it; see `named_device`.

    A GPU becomes the current one, for libraries that are not told which.

    Raises: EdmDistillError: no such device is here, or torch cannot use it.
    """
    device = named_device(name)
    try:
        if is_gpu(device) and device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise EdmDistillError(f"{device} cannot be used here ({reason}): choose another --device") from error
    return device


def process_device(name: str | None) -> torch.device:
    """Returns the device of this process: of several on one machine, each has its own GPU.

    Args: as `pick_device`.
    Raises: EdmDistillError: as `pick_device`; or there are fewer GPUs than processes.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or named_device(name) != torch.device("cuda"):
        return pick_device(name)
    if int(rank) >= (count := torch.cuda.device_count()):
        raise EdmDistillError(
            f"this machine has {counted(count, 'GPU')}, too few for process {int(rank) + 1}: start no more processes "
            "than GPUs, or add --device cpu"
        )
    return pick_device(f"cuda:{rank}")  # a first tensor on cuda would take memory of GPU 0 in every process


def named_device(name: str | None) -> torch.device:
    """Returns the device of that name, cpu, cuda or cuda:N; of None, cuda, or cpu where there is no GPU.

    Raises: EdmDistillError: no such device is here.
    """
    known = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", "cpu" if name is None else name)
    if known is None:
        raise EdmDistillError(f"there is no device {name!r}: use cpu, cuda, or cuda:N for GPU N, from 0")
    count = torch.cuda.device_count()
    if name is None:
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not count:
        raise EdmDistillError(
            f"{name} cannot be used because torch finds no CUDA device here: give --device cpu, or see why by "
            "`edmdistill doctor`"
        )
    if known[1] is not None and int(known[1]) >= count:
        gpus = "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise EdmDistillError(f"there is no {name}: this machine has {gpus}")
    return torch.device(name)


def named_dtype(name: str | None, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Returns torch's dtype of that name, such as float16; float32 for tf32; auto, see `load_model`, for None.

    Raises: EdmDistillError: tf32 on another device than CUDA.
    """
    if name == "tf32" and device.type != "cuda":
        raise EdmDistillError("tf32 is for CUDA, and this runs on the CPU: use float32")
    return "auto" if name is None else getattr(torch, "float32" if name == "tf32" else name)
