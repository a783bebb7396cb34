"""The host that a process runs on: cores, memory, processor."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys
from itertools import product
from pathlib import Path, PurePosixPath

from edmdistill.threads import usable_cores

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of parameters, in malloc.h."""

LIMITS: dict[int | None, str] = {
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u, or the container's)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""What helps where a limit of this user or process was reached, by the number of the system's error."""


def cores() -> int:
    """Returns the number of CPU cores that this process may use, within the quotas of its control groups, v2 or v1."""
    count = usable_cores()
    for folder in _control_groups("cpu"):
        v1 = (read_system_file(f"{folder}/cpu.cfs_{part}_us").strip() for part in ("quota", "period"))
        quota, period = read_system_file(f"{folder}/cpu.max").split() or v1  # microseconds
        if quota.isdigit():
            count = min(count, -(-int(quota) // int(period)))
    return count


def host_memory() -> tuple[int, int]:
    """Returns total and free memory in bytes, within the limits of this process's control groups, v2 or v1."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in read_system_file("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    v1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
    for folder, names in product(_control_groups("memory"), (("memory.max", "memory.current"), v1)):
        limit, used = (read_system_file(f"{folder}/{name}").strip() for name in names)
        if limit.isdigit() and used.isdigit():
            total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return total, free


def _control_groups(controller: str) -> list[str]:
    """Returns the folders of this process's control group and of those around it, v2 or v1, whether they exist or not.

    A container sees its own group as the root; in a Slurm job, the limits are those of a group below it.
    """
    folders = ["/sys/fs/cgroup", f"/sys/fs/cgroup/{controller}"]
    for line in read_system_file("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)  # 0::/the/group of v2, 4:cpu,cpuacct:/the/group of v1
        if not controllers or controller in controllers.split(","):
            path = PurePosixPath(group)
            folders += [f"{folders[bool(controllers)]}{inner}" for inner in (path, *path.parents) if inner.name]
    return folders


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed blocks of up to 32 MB, in the whole process; without glibc it does nothing.

    By default malloc returns them to the kernel, and each batch of images has to get its pages again: a fifth of the
    time of sampling 256 small images on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 2**30)


def peak_host_memory() -> int:
    """Returns the most memory, in bytes, that this process has held so far."""
    for line in read_system_file("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Elsewhere than on Linux, where ru_maxrss would count the parent's memory too.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """Returns the CPU's model name, or its architecture where the system does not name it."""
    lines = read_system_file("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def read_system_file(path: str) -> str:
    """Returns the text of a file under /proc or /sys, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
