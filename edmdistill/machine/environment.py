"""The environment of a run: versions, device and git revision, as sessions.jsonl records them; peak memory."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import torch

import edmdistill
from edmdistill.errors import counted
from edmdistill.kernels.backend import selected
from edmdistill.machine.engine import Engine, Machine
from edmdistill.machine.host import cores, host_memory, peak_host_memory, processor
from edmdistill.transfer import is_gpu
from edmdistill.version import revision


class Usage(TypedDict):
    """How a run uses the hardware: all of `Machine` that changes rounding, memory or speed.

    micro_batch is None where nobody gave one, or where it is not settled yet. workers are those of the main process.
    What is not required is missing in earlier runs.
    """

    processes: int
    micro_batch: int | None
    shard: bool
    offload: list[str]
    checkpointing: bool
    second_moment: NotRequired[str]
    loss_pieces: NotRequired[int]
    compile: NotRequired[str]
    workers: NotRequired[int]


class Environment(Usage):
    """The environment of a run, none of which changes the result beyond rounding.

    device and device_memory (bytes) describe the main process's GPU, or the host; threads are those of the main
    process. What is not required is missing in earlier runs.
    """

    edmdistill: str
    revision: str | None
    python: str
    torch: str
    cuda: str | None
    system: str
    device: str
    device_memory: int
    kernels: NotRequired[str]
    threads: NotRequired[int]


class SessionRecord(Environment):
    """A line of sessions.jsonl: the environment from `images` images on."""

    images: int
    began: str


def environment(engine: Engine) -> Environment:
    """Returns the environment of this process."""
    device = engine.device
    if is_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{processor()}, {counted(cores(), 'core')}", host_memory()[0]
    return {
        "edmdistill": edmdistill.__version__,
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu(device) else None,
        "system": platform.platform(terse=True),
        "device": name,
        "device_memory": memory,
        **usage(engine),
        "kernels": selected(),
        "threads": torch.get_num_threads(),
    }


def usage(engine: Engine) -> Usage:
    """Returns how this process's run uses the hardware."""
    machine = engine.machine
    return {
        "processes": engine.world_size,
        "micro_batch": None if machine.micro_batch == "auto" else machine.micro_batch,
        "shard": machine.shard,
        "offload": list(machine.offload),
        "checkpointing": machine.checkpointing,
        "second_moment": machine.second_moment,
        "loss_pieces": machine.loss_pieces,
        "compile": machine.compile or "off",
        "workers": engine.workers,
    }


def machine_of(session: Mapping[str, Any]) -> Machine:
    """Returns how a session used its machine, apart from the device, with defaults for what earlier runs do not say."""
    fields = {name: session[name] for name in Machine._fields if name in session and name != "device"}
    return Machine(**fields | {"offload": tuple(session.get("offload", ()))})


def peak_memory(device: torch.device) -> int:
    """Returns the most memory, in bytes, that this process has held: its tensors on a GPU, or all of it on the host."""
    return torch.cuda.max_memory_allocated(device) if is_gpu(device) else peak_host_memory()
