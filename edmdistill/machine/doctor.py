"""What a machine has and what it lacks, a line a thing, each with its fix.

What may crash or poison a process when it is imported, is imported in another one.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import edmdistill
from edmdistill.machine.launch import cores

GIB = 2**30


class Finding(NamedTuple):
    """A line: what was looked at, how it stands, what was found, and what to do about it."""

    check: str
    level: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def examine() -> Iterator[Finding]:
    """Everything, in the order of CHECKS, as it is known; what needs torch, only if torch is sound."""
    sound = True
    for name, check in {**CHECKS, **TORCH_CHECKS}.items():
        if name in TORCH_CHECKS and not sound:
            continue
        try:
            for finding in check():
                sound = sound and (finding.check, finding.level) != ("torch", "fail")
                yield finding
        except Exception as error:  # one broken thing must not hide the others
            found = f"could not be looked at: {type(error).__name__}: {_first_line(error)}"
            yield Finding(name, "fail", found, "see whether the lines above explain it, and report it if not")


# The Python side.


def check_python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("edmdistill", "ok", f"{edmdistill.__version__} in {Path(edmdistill.__file__).parent}")


def check_requirements() -> Iterator[Finding]:
    """The versions installed against those that this package asks for."""
    from packaging.requirements import Requirement

    try:
        asked = metadata.requires("edmdistill") or []
    except metadata.PackageNotFoundError:
        yield Finding("requirements", "fail", "edmdistill itself is not installed", "pip install -e . in its folder")
        return
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, str(requirement.specifier)
        fix = f"pip install '{name}{bounds}'"
        version = _version(name)
        if version is None:
            yield Finding(name, "fail", "not installed", fix)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "fail", f"{version}, but {bounds} is needed", fix)
        else:
            yield Finding(name, "ok", version + (f" ({bounds})" if bounds else ""))


def check_torch() -> Iterator[Finding]:
    if _version("torch") is None:
        return  # which has been told
    error = _import_error("torch")
    if error is not None:
        fix = "reinstall it by the selector on pytorch.org, for this system and driver"
        yield Finding("torch", "fail", f"cannot be imported: {error}", fix)
        return
    import torch

    cuda = torch.version.cuda
    yield Finding("torch build", "ok", f"for CUDA {cuda}" if cuda else "for the CPU alone")


def check_namesakes() -> Iterator[Finding]:
    """PyPI has packages by the names of NVIDIA's modules, which official code takes for them."""
    found = [name for name in ("dnnlib", "torch_utils") if _version(name) is not None]
    if found:
        names = " and ".join(found)
        fix = f"pip uninstall {' '.join(found)}; official pickles are read here without them"
        yield Finding("namesakes", "warn", f"PyPI's {names}, which is not NVIDIA's", fix)
    else:
        yield Finding("namesakes", "ok", "no dnnlib or torch_utils from PyPI")


# The machine.


def check_memory() -> Iterator[Finding]:
    total, free = host_memory()
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {cores()} cores"
    if free < 4 * GIB:
        yield Finding("memory", "warn", found, "end other processes, or train with a smaller --micro-batch")
    else:
        yield Finding("memory", "ok", found)


def check_disk() -> Iterator[Finding]:
    """Room for a run here, and for downloads; a state of CoSIM on EDM2-S takes 6 GB and more."""
    for name, folder in (("disk", Path.cwd()), ("hub cache", _hub_cache())):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(place).free / GIB
        found = f"{free:.1f} GiB free for {folder}"
        fix = "make room, or put --run-dir elsewhere" if name == "disk" else "make room, or set HF_HOME elsewhere"
        yield Finding(name, *(("ok", found) if free > 20 else ("fail" if free < 1 else "warn", found, fix)))


def check_locks() -> Iterator[Finding]:
    """A run directory keeps a second process out by flock, which some network file systems lack."""
    other = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    fix = "put --run-dir on a local disk, or one with locks, or never train twice in the same one"
    try:
        with tempfile.NamedTemporaryFile(dir=".", prefix=".edmdistill-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            second = subprocess.run([sys.executable, "-c", other, file.name], capture_output=True, check=False)
    except PermissionError:
        yield Finding("locks", "warn", f"{Path.cwd()} cannot be written to", "give a --run-dir elsewhere")
    except OSError as error:
        yield Finding("locks", "fail", f"files in {Path.cwd()} cannot be locked: {error.strerror}", fix)
    else:
        if second.returncode == 0:
            yield Finding("locks", "fail", f"a lock in {Path.cwd()} keeps nobody out", fix)
        else:
            yield Finding("locks", "ok", f"files in {Path.cwd()} can be locked")


def check_shared_memory() -> Iterator[Finding]:
    """Data workers hand over their batches in /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm on this system")
        return
    size = shutil.disk_usage(folder)
    found = f"{size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free in {folder}"
    if size.free < GIB:
        yield Finding("shared memory", "warn", found, "docker run --shm-size=8g, or train with --workers 0")
    else:
        yield Finding("shared memory", "ok", found)


# What needs torch.


def check_image_packages() -> Iterator[Finding]:
    """torchvision and timm, which no command here needs, but whose wreck diffusers and transformers trip over."""
    for name in ("torchvision", "timm"):
        version = _version(name)
        if version is None:
            yield Finding(name, "ok", "not installed, and not needed")
            continue
        error = _import_error(name)
        if error is None:
            yield Finding(name, "ok", version)
        else:
            yield Finding(
                name,
                "fail",
                f"{version} does not fit torch {_version('torch')}, which breaks diffusers and transformers: {error}",
                f"pip uninstall {name}, or install the {name} that belongs to this torch from the same index",
            )


def check_devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/proc/driver/nvidia/version").exists() and shutil.which("nvidia-smi") is None:
            yield Finding("devices", "ok", "no CUDA device: everything runs on the CPU, slowly")
        elif torch.version.cuda is None:
            fix = "install a torch with CUDA, by the selector on pytorch.org"
            yield Finding("devices", "warn", "an NVIDIA driver is here, but torch is built for the CPU alone", fix)
        else:
            found = f"an NVIDIA driver is here, but torch, built for CUDA {torch.version.cuda}, sees no device"
            fix = "see CUDA_VISIBLE_DEVICES and nvidia-smi; an old driver wants a torch built for an older CUDA"
            yield Finding("devices", "fail", found, fix)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {major}.{minor}, {'with' if major >= 8 else 'without'} bf16"
        )
        try:
            torch.ones(1, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            fix = "install a torch that is built for this device, by the selector on pytorch.org"
            yield Finding(f"cuda:{index}", "fail", f"{found}: {_first_line(error)}", fix)
        else:
            yield Finding(f"cuda:{index}", "ok", found)


def check_tangents() -> Iterator[Finding]:
    """The forward derivative of every kind of network, which sCM trains by, against finite differences."""
    import torch

    from edmdistill.kernels.dual import Dual
    from edmdistill.networks import NETWORKS, new_network

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    errors = {}
    for kind in NETWORKS:
        # With attention at every resolution that there is; weights of this size leave no part without effect.
        arguments = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4]}
        network = new_network(kind, 4, 1, 0, **arguments).to(device, torch.float64).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(0.1 * normal(*parameter.shape) + (parameter.ndim < 2))
        x, c_noise, dx, dc = normal(1, 1, 4, 4), normal(1), normal(1, 1, 4, 4), normal(1)
        tangent, step = network(Dual(x, dx), Dual(c_noise, dc)).tangent, 1e-6
        ahead, behind = (network(x + sign * step * dx, c_noise + sign * step * dc) for sign in (1, -1))
        truth = (ahead - behind) / (2 * step)
        errors[kind] = ((tangent - truth).norm() / truth.norm()).item()
    worst = max(errors, key=lambda kind: errors[kind])
    found = f"of {', '.join(errors)} on {device}: off by {errors[worst]:.0e} at most"
    if errors[worst] < 1e-6:
        yield Finding("forward derivative", "ok", found)
    else:
        yield Finding("forward derivative", "fail", f"{found}, in {worst}", "try another version of torch")


def check_distributed() -> Iterator[Finding]:
    """A group of one process for each backend that training uses here."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("distributed", "warn", "this torch cannot train in several processes", "install another build")
        return
    backends = {"gloo": "cpu"} | ({"nccl": "cuda"} if torch.cuda.is_available() else {})
    for backend, device in backends.items():
        if not dist.is_backend_available(backend):
            yield Finding(backend, "warn", "this torch has none", "install another build to train in several processes")
            continue
        try:
            minute, store = datetime.timedelta(minutes=1), dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=minute)
            try:
                value = torch.ones(1, device=device)
                dist.all_reduce(value)
                assert value.item() == 1
            finally:
                dist.destroy_process_group()
        except RuntimeError as error:
            fix = f"set {backend.upper()}_SOCKET_IFNAME to a network interface that works, lo for one machine"
            yield Finding(backend, "fail", f"no group of processes: {_first_line(error)}", fix)
        else:
            nccl: Any = torch.cuda.nccl
            version = ".".join(map(str, nccl.version())) + ", " if backend == "nccl" else ""
            yield Finding(backend, "ok", f"{version}a group of one process works")


# Means.


def _version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """What goes wrong when another process imports it; None: nothing."""
    command = [sys.executable, "-P", "-c", f"import {module}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode < 0:
        return f"it dies of {signal.Signals(-done.returncode).name}"
    if done.returncode > 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def host_memory() -> tuple[int, int]:
    """Bytes in all and bytes free, within the bounds of the control group."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = _read("/proc/meminfo").splitlines()
    for line in lines:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return total, free


def _read(path: str) -> str:
    """A file of the system, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _hub_cache() -> Path:
    """Where the Hub's client keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


CHECKS: dict[str, Check] = {
    "python": check_python,
    "requirements": check_requirements,
    "torch": check_torch,
    "namesakes": check_namesakes,
    "memory": check_memory,
    "disk": check_disk,
    "locks": check_locks,
    "shared memory": check_shared_memory,
}
TORCH_CHECKS: dict[str, Check] = {
    "image packages": check_image_packages,
    "devices": check_devices,
    "forward derivative": check_tangents,
    "distributed": check_distributed,
}
