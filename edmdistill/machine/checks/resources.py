"""Checks of memory, disks and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edmdistill.checkpoints.download import cache_folder
from edmdistill.errors import CheckpointError, counted
from edmdistill.machine.checks.finding import GIB, Finding
from edmdistill.machine.host import cores, host_memory


def check_memory() -> Iterator[Finding]:
    total, free = host_memory()
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {counted(cores(), 'core')}"
    if free < 4 * GIB:
        yield Finding("memory", "warn", detail, "stop other processes, or train with a smaller --micro-batch")
    else:
        yield Finding("memory", "ok", detail)


def check_threads() -> Iterator[Finding]:
    """Checks that torch computes with no more threads than there are cores, as it does in containers with a quota."""
    import torch

    threads, count = torch.get_num_threads(), cores()
    detail = f"torch computes with {counted(threads, 'thread')} on {counted(count, 'core')}"
    if threads > count:
        yield Finding("threads", "warn", f"{detail}, which makes all of them wait", f"set OMP_NUM_THREADS={count}")
    else:
        yield Finding("threads", "ok", detail)


def check_disk() -> Iterator[Finding]:
    """Checks the space for a run in this folder, and for downloads; a state of CoSIM on EDM2-S takes over 6 GB."""
    for name, find, other in (
        ("disk", Path.cwd, "train with a --run-dir on another disk"),
        ("cache", cache_folder, "set EDMDISTILL_CACHE to a folder on another disk"),
        ("hub cache", _hub_cache, "set HF_HOME to a folder on another disk"),
    ):
        try:
            folder = find()
        except (CheckpointError, RuntimeError):  # as of a container's user, who has a number alone
            yield Finding(name, "warn", "there is no home folder for it", other)
            continue
        place = next(parent for parent in (folder, *folder.parents) if os.path.isdir(parent))  # False if unreachable
        free = shutil.disk_usage(place).free / GIB
        detail = f"{free:.1f} GiB free for {folder}"
        if not os.access(place, os.W_OK | os.X_OK):
            yield Finding(name, "warn", f"{folder} cannot be written", other)
        elif free > 20:
            yield Finding(name, "ok", detail)
        else:
            yield Finding(name, "fail" if free < 1 else "warn", detail, f"free some space, or {other}")


def check_temporary_files() -> Iterator[Finding]:
    """Checks that torch finds a folder for temporary files, without which it does not train, compile or export."""
    try:
        yield Finding("temporary files", "ok", f"are written in {tempfile.gettempdir()}")
    except FileNotFoundError:
        yield Finding("temporary files", "fail", "no folder for them can be written", "set TMPDIR to one that can")


def check_locks() -> Iterator[Finding]:
    """Checks flock, which protects a run directory from a second process and which some network file systems lack."""
    other = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    fix = "train with a --run-dir on a local disk, or never train twice in the same one"
    try:
        with tempfile.NamedTemporaryFile(dir=".", prefix=".edmdistill-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            second = subprocess.run([sys.executable, "-P", "-c", other, file.name], capture_output=True, check=False)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            yield Finding("locks", "warn", f"{Path.cwd()} is not writable", "train with a --run-dir elsewhere")
            return
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


def _hub_cache() -> Path:
    """Returns the folder of huggingface_hub's downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
