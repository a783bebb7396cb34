"""What a process knows of its host, and the memory that it keeps."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edmdistill.machine import host

GIB = 2**30

FAULTS = """
import resource
from edmdistill.machine.host import keep_freed_memory
if {kept}:
    keep_freed_memory()
for _ in range(3):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytes([i]) * (16 * 2**20) for i in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the parameters are those of glibc's malloc")
def test_large_blocks_that_were_freed_cost_no_pages_again() -> None:
    default, kept = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)])) for kept in (False, True)
    )
    assert default > 100 > kept


def files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    """Of /proc and /sys, by the last part of their paths, those alone."""
    monkeypatch.setattr(
        host, "read_system_file", lambda path: contents.get(path.rpartition("/")[2].replace(".", "_"), "")
    )


UNLIMITED = 2**63 - 4096
"""Of control groups of the first version: the most pages that a signed number counts."""


@pytest.mark.parametrize(
    ("limit", "used", "memory"),
    [
        ("", "", (16 * GIB, 10 * GIB)),
        ("max\n", "4096\n", (16 * GIB, 10 * GIB)),
        (f"{12 * GIB}\n", f"{3 * GIB}\n", (12 * GIB, 9 * GIB)),
        (f"{12 * GIB}\n", f"{GIB}\n", (12 * GIB, 10 * GIB)),
        (f"{64 * GIB}\n", f"{60 * GIB}\n", (16 * GIB, 4 * GIB)),
        (f"{UNLIMITED}\n", "4096\n", (16 * GIB, 10 * GIB)),
    ],
    ids=["no control group", "no limit", "limited", "less free on the host", "more than there is", "no limit of v1"],
)
@pytest.mark.parametrize("version", [2, 1])
def test_memory_is_what_host_and_control_group_allow(
    limit: str, used: str, memory: tuple[int, int], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * GIB // 4096}
    monkeypatch.setattr(host.os, "sysconf", pages.__getitem__)
    meminfo = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable:   {10 * GIB // 1024} kB\n"
    names = ("memory_max", "memory_current") if version == 2 else ("memory_limit_in_bytes", "memory_usage_in_bytes")
    files(monkeypatch, meminfo=meminfo, **dict(zip(names, (limit, used), strict=True)))
    assert host.host_memory() == memory


def test_memory_of_a_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch)
    total, free = host.host_memory()
    assert total == free > 0
    usage = SimpleNamespace(ru_maxrss=3_000_000)
    monkeypatch.setattr(host.resource, "getrusage", lambda who: usage)
    for system, peak in (("darwin", 3_000_000), ("freebsd", 3_072_000_000)):
        monkeypatch.setattr(host.sys, "platform", system)
        assert host.peak_host_memory() == peak
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "riscv64")
    assert host.processor() == "riscv64"
    monkeypatch.setattr(host.platform, "processor", lambda: "arm")
    assert host.processor() == "arm"


def test_what_linux_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "processor : 0\nmodel name\t: AMD EPYC: 7B13\nmodel name\t: another\n"
    files(monkeypatch, status="VmPeak: 9 kB\nVmHWM:\t   1234 kB\nVmRSS: 7 kB\n", cpuinfo=cpu)
    assert host.peak_host_memory() == 1234 * 1024
    assert host.processor() == "AMD EPYC: 7B13"
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert host.cores() == 3
    monkeypatch.delattr(host.os, "sched_getaffinity")
    for count, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(host.os, "cpu_count", lambda count=count: count)
        assert host.cores() == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("", 8), ("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000\n", 3), ("5000 100000\n", 1), ("9 1\n", 8)],
)
def test_cores_are_what_affinity_and_control_group_allow(
    quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(8), raising=False)
    files(monkeypatch, cpu_max=quota)
    assert host.cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("", 8), ("-1\n", 8), ("200000\n", 2), ("250000\n", 3), ("5000\n", 1)])
def test_cores_within_a_control_group_of_the_first_version(
    quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(8), raising=False)
    files(monkeypatch, cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000\n")
    assert host.cores() == cores


@pytest.mark.parametrize(
    ("groups", "root"),
    [
        ("0::/slurm/job_7/step_0\n", "/sys/fs/cgroup"),
        ("9:pids:/else\n4:cpu,cpuacct:/slurm/job_7\n3:memory:/slurm/job_7/step_0\n", None),
    ],
    ids=["v2", "v1"],
)
def test_limits_of_a_job_are_in_a_group_of_its_own(
    groups: str, root: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root's files, and the step's, set none."""
    job = f"{root}/slurm/job_7"
    v2 = {f"{job}/cpu.max": "200000 100000\n", f"{job}/memory.max": f"{GIB}\n", f"{job}/memory.current": "0\n"}
    v2 |= {f"{job}/step_0/cpu.max": "max 100000\n", f"{job}/step_0/memory.max": "max\n"}
    cpu, memory = (f"/sys/fs/cgroup/{name}/slurm/job_7" for name in ("cpu", "memory"))
    v1 = {f"{cpu}/cpu.cfs_quota_us": "200000\n", f"{cpu}/cpu.cfs_period_us": "100000\n"}
    v1 |= {f"{memory}/memory.limit_in_bytes": f"{GIB}\n", f"{memory}/memory.usage_in_bytes": "0\n"}
    system = {"/proc/self/cgroup": groups} | (v2 if root else v1)
    monkeypatch.setattr(host, "read_system_file", lambda path: system.get(path, ""))
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert host.cores() == 2
    assert host.host_memory()[0] == GIB


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("text")
    assert [host.read_system_file(str(tmp_path / name)) for name in ("there", "not", ".")] == ["text", "", ""]
