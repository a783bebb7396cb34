"""Checks of the machine and the installation, each with a line of result and a fix.

Packages that could crash this process, or change it, are imported in another process.
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
from edmdistill.machine.host import cores, host_memory

GIB = 2**30


class Finding(NamedTuple):
    """One line of the doctor's report.

    Attributes:
        check: what was checked.
        level: ok, warn or fail.
        detail: what was found.
        fix: what to do about it, unless it is ok.
    """

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def diagnose() -> Iterator[Finding]:
    """Yields the findings of all checks, in the order of CHECKS; TORCH_CHECKS are skipped if torch is broken."""
    sound = True
    for name, check in {**CHECKS, **TORCH_CHECKS}.items():
        if name in TORCH_CHECKS and not sound:
            continue
        try:
            for finding in check():
                sound = sound and (finding.check, finding.level) != ("torch", "fail")
                yield finding
        except Exception as error:  # one broken check must not hide the others
            detail = f"could not be checked: {type(error).__name__}: {_first_line(error)}"
            yield Finding(name, "fail", detail, "report this, unless the lines above explain it")


# Python.


def check_python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("edmdistill", "ok", f"{edmdistill.__version__} in {Path(edmdistill.__file__).parent}")


def check_requirements() -> Iterator[Finding]:
    """Compares the installed versions with those that this package requires."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("edmdistill") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "requirements", "fail", "edmdistill itself is not installed", "run pip install -e . in its folder"
        )
        return
    for requirement in map(Requirement, required):
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
        return  # check_requirements reports it
    error = _import_error("torch")
    if error is not None:
        fix = "reinstall it with the command that pytorch.org gives for this system and driver"
        yield Finding("torch", "fail", f"cannot be imported: {error}", fix)
        return
    import torch

    cuda = torch.version.cuda
    yield Finding("torch build", "ok", f"for CUDA {cuda}" if cuda else "CPU only")


def check_namesakes() -> Iterator[Finding]:
    """Finds PyPI packages with the names of NVIDIA's modules, which official code would import in their place."""
    installed = [name for name in ("dnnlib", "torch_utils") if _version(name) is not None]
    if installed:
        detail = f"{' and '.join(installed)} from PyPI, unrelated to NVIDIA's modules of that name"
        fix = f"pip uninstall {' '.join(installed)}; edmdistill reads official pickles without them"
        yield Finding("namesakes", "warn", detail, fix)
    else:
        yield Finding("namesakes", "ok", "no dnnlib or torch_utils from PyPI")


# The machine.


def check_memory() -> Iterator[Finding]:
    total, free = host_memory()
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {cores()} cores"
    if free < 4 * GIB:
        yield Finding("memory", "warn", detail, "stop other processes, or train with a smaller --micro-batch")
    else:
        yield Finding("memory", "ok", detail)


def check_disk() -> Iterator[Finding]:
    """Checks the space for a run in this folder, and for downloads; a state of CoSIM on EDM2-S takes over 6 GB."""
    for name, folder in (("disk", Path.cwd()), ("hub cache", _hub_cache())):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(place).free / GIB
        detail = f"{free:.1f} GiB free for {folder}"
        other = "use a --run-dir on another disk" if name == "disk" else "set HF_HOME to a folder on another disk"
        fix = f"free some space, or {other}"
        yield Finding(name, *(("ok", detail) if free > 20 else ("fail" if free < 1 else "warn", detail, fix)))


def check_locks() -> Iterator[Finding]:
    """Checks flock, which protects a run directory from a second process and which some network file systems lack."""
    other = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    fix = "use a --run-dir on a local disk, or never train twice in the same one"
    try:
        with tempfile.NamedTemporaryFile(dir=".", prefix=".edmdistill-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            second = subprocess.run([sys.executable, "-c", other, file.name], capture_output=True, check=False)
    except PermissionError:
        yield Finding("locks", "warn", f"{Path.cwd()} is not writable", "use a --run-dir elsewhere")
    except OSError as error:
        yield Finding("locks", "fail", f"files in {Path.cwd()} cannot be locked: {error.strerror}", fix)
    else:
        if second.returncode == 0:
            yield Finding("locks", "fail", f"locks in {Path.cwd()} have no effect", fix)
        else:
            yield Finding("locks", "ok", f"files in {Path.cwd()} can be locked")


def check_shared_memory() -> Iterator[Finding]:
    """Checks the size of /dev/shm, through which data workers pass their batches."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm on this system")
        return
    size = shutil.disk_usage(folder)
    detail = f"{size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free in {folder}"
    if size.free < GIB:
        yield Finding("shared memory", "warn", detail, "use docker run --shm-size=8g, or train with --workers 0")
    else:
        yield Finding("shared memory", "ok", detail)


# torch.


def check_image_packages() -> Iterator[Finding]:
    """Checks torchvision and timm: no command needs them, but broken ones break diffusers and transformers."""
    for name in ("torchvision", "timm"):
        version = _version(name)
        if version is None:
            yield Finding(name, "ok", "not installed (not needed)")
            continue
        error = _import_error(name)
        if error is None:
            yield Finding(name, "ok", version)
        else:
            yield Finding(
                name,
                "fail",
                f"{version} does not match torch {_version('torch')}, which breaks diffusers and transformers: {error}",
                f"pip uninstall {name}, or install the {name} version for this torch from the same index",
            )


def check_devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/proc/driver/nvidia/version").exists() and shutil.which("nvidia-smi") is None:
            yield Finding("devices", "ok", "no CUDA device: everything runs on the CPU, slowly")
        elif torch.version.cuda is None:
            fix = "install a CUDA build of torch with the command that pytorch.org gives"
            yield Finding("devices", "warn", "there is an NVIDIA driver, but torch is a CPU-only build", fix)
        else:
            detail = f"there is an NVIDIA driver, but torch, built for CUDA {torch.version.cuda}, sees no GPU"
            fix = "check CUDA_VISIBLE_DEVICES and nvidia-smi; an old driver needs a torch built for an older CUDA"
            yield Finding("devices", "fail", detail, fix)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        detail = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {major}.{minor}, {'with' if major >= 8 else 'without'} bf16"
        )
        try:
            torch.ones(1, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            fix = "install a torch that is built for this GPU with the command that pytorch.org gives"
            yield Finding(f"cuda:{index}", "fail", f"{detail}: {_first_line(error)}", fix)
        else:
            yield Finding(f"cuda:{index}", "ok", detail)


def check_tangents() -> Iterator[Finding]:
    """Compares every network's forward derivative, which sCM trains with, with finite differences."""
    import torch

    from edmdistill.kernels.dual import Dual
    from edmdistill.networks import NETWORKS, new_network
    from edmdistill.networks.base import Conditioning

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    errors = {}
    for kind in NETWORKS:
        # Attention at every resolution, and weights large enough for every layer to matter.
        arguments = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4]}
        network = new_network(kind, 4, 1, 0, **arguments).to(device, torch.float64).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(0.1 * normal(*parameter.shape) + (parameter.ndim < 2))
        x, c_noise, dx, dc = normal(1, 1, 4, 4), normal(1), normal(1, 1, 4, 4), normal(1)
        moving: Any = Dual(c_noise, dc)
        tangent, step = network(Dual(x, dx), Conditioning(moving)).tangent, 1e-6
        ahead, behind = (network(x + sign * step * dx, Conditioning(c_noise + sign * step * dc)) for sign in (1, -1))
        truth = (ahead - behind) / (2 * step)
        errors[kind] = ((tangent - truth).norm() / truth.norm()).item()
    worst = max(errors, key=lambda kind: errors[kind])
    detail = f"{', '.join(errors)} on {device}: relative error at most {errors[worst]:.0e}"
    if errors[worst] < 1e-6:
        yield Finding("forward derivative", "ok", detail)
    else:
        yield Finding("forward derivative", "fail", f"{detail}, in {worst}", "try another version of torch")


def check_distributed() -> Iterator[Finding]:
    """Makes a process group of one process with each backend that training uses here."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding(
            "distributed", "warn", "this torch cannot train in several processes", "install another build of torch"
        )
        return
    backends = {"gloo": "cpu"} | ({"nccl": "cuda"} if torch.cuda.is_available() else {})
    for backend, device in backends.items():
        if not dist.is_backend_available(backend):
            yield Finding(
                backend, "warn", "not in this torch", "install another build of torch to train in several processes"
            )
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
            fix = f"set {backend.upper()}_SOCKET_IFNAME to a working network interface, such as lo for one machine"
            yield Finding(backend, "fail", f"cannot make a process group: {_first_line(error)}", fix)
        else:
            nccl: Any = torch.cuda.nccl
            version = ".".join(map(str, nccl.version())) + ", " if backend == "nccl" else ""
            yield Finding(backend, "ok", f"{version}a process group of one process works")


# Helpers.


def _version(name: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Returns the error of importing a module in another process; None: it imports."""
    command = [sys.executable, "-P", "-c", f"import {module}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    if done.returncode > 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _hub_cache() -> Path:
    """Returns the folder of huggingface_hub's downloads."""
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
