"""Where a run computes: versions, device and revision, for its sessions.jsonl; and the memory that it has taken."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch

import edmdistill
from edmdistill.machine.doctor import host_memory
from edmdistill.machine.engine import Engine
from edmdistill.machine.launch import cores


class Environment(TypedDict):
    """What a run computes with; nothing of it changes what is computed beyond rounding.

    device and device_memory (bytes) are the GPU's or the host's, of the main process.
    """

    edmdistill: str
    revision: str | None
    python: str
    torch: str
    cuda: str | None
    system: str
    device: str
    device_memory: int
    processes: int
    micro_batch: int | None
    shard: bool
    offload: list[str]
    checkpointing: bool


class Session(Environment):
    """A line of sessions.jsonl: where a run was computed from `images` on."""

    images: int
    began: str


def environment(engine: Engine) -> Environment:
    """Returns what this run computes with."""
    machine, device = engine.machine, engine.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{_processor()}, {cores()} {'core' if cores() == 1 else 'cores'}", host_memory()[0]
    return {
        "edmdistill": edmdistill.__version__,
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "system": platform.platform(terse=True),
        "device": name,
        "device_memory": memory,
        "processes": engine.world_size,
        "micro_batch": None if machine.micro_batch == "auto" else machine.micro_batch,
        "shard": machine.shard,
        "offload": list(machine.offload),
        "checkpointing": machine.checkpointing,
    }


def revision(package: Path = Path(edmdistill.__file__).parent) -> str | None:
    """The commit that the package is of, with -dirty if it was changed since; None where it is of no known one."""
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")  # some other project's repository may be around it
        return _git(package, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        installed = json.loads(metadata.distribution("edmdistill").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    commit: str | None = installed.get("vcs_info", {}).get("commit_id")
    return commit


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU its tensors; on the host all that it is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux: and there the parent's memory does not count
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
