"""Disks, memory and locks that are not enough."""

import errno
import os
import shutil
import tempfile
import types
from pathlib import Path

import pytest
from machine_findings import only_finding

from edmdistill.machine import host
from edmdistill.machine.checks import resources
from edmdistill.machine.checks.evaluations import check_evaluations
from edmdistill.machine.checks.finding import GIB
from edmdistill.machine.host import host_memory

DISK = types.SimpleNamespace


@pytest.mark.parametrize(("free", "level"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, level: str):
    asked = []

    def usage(path: Path) -> DISK:
        asked.append(path)
        return DISK(total=100 * GIB, free=free * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "made"))
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert [finding.level for finding in resources.check_disk()] == [level] * 3
    assert asked == [tmp_path] * 3
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nothing is read-only to root
    assert [finding.level for finding in resources.check_disk()] == ["warn"] * 3
    assert [finding.fix for finding in resources.check_disk()][1].startswith("set EDMDISTILL_CACHE to a folder ")


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/home/x"}, "/home/x/.cache/huggingface/hub"),
    ],
)
def test_the_hubs_cache(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], folder: str):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert resources._hub_cache() == Path(folder)


@pytest.mark.parametrize(("free", "level"), [(2, "warn"), (8, "ok")])
def test_memory_within_a_control_group(monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    files = {
        "/proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n",
        "/sys/fs/cgroup/memory.max": f"{10 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{(10 - free) * GIB}\n",
    }
    monkeypatch.setattr(host, "read_system_file", lambda path: files.get(path, ""))
    finding = only_finding(resources.check_memory)
    assert finding.level == level
    assert finding.detail.startswith(f"{free:.1f} of 10.0 GiB free, ")
    files |= {"/sys/fs/cgroup/memory.max": "max\n"}
    assert host_memory()[1] == 32 * GIB


@pytest.mark.parametrize(("quota", "level"), [("max 100000\n", "ok"), ("200000 100000\n", "warn")])
def test_threads_within_a_control_group(monkeypatch: pytest.MonkeyPatch, quota: str, level: str):
    monkeypatch.setattr(host, "read_system_file", lambda path: quota if path.endswith("/cpu.max") else "")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(16), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    finding = only_finding(resources.check_threads)
    assert finding.level == level
    assert finding.fix == ("" if level == "ok" else "set OMP_NUM_THREADS=2")


def test_locks_that_keep_nobody_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert only_finding(resources.check_locks).level == "ok"
    monkeypatch.setattr(resources.fcntl, "flock", lambda file, operation: None)
    assert only_finding(resources.check_locks).detail == f"locks in {tmp_path} have no effect"

    def refused(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(resources.fcntl, "flock", refused)
    assert only_finding(resources.check_locks).detail == f"files in {tmp_path} cannot be locked: No locks available"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_locks_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, number: int):
    def refused(**options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(resources.tempfile, "NamedTemporaryFile", refused)
    finding = only_finding(resources.check_locks)
    assert (finding.level, finding.fix) == ("warn", "train with a --run-dir elsewhere")


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch):
    """As in a container whose user has a number alone; or with the home folder of another, which may not be entered."""
    for name in ("EDMDISTILL_CACHE", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert [finding.detail for finding in resources.check_disk()][1:] == ["there is no home folder for it"] * 2
    assert only_finding(check_evaluations).level == "ok"
    monkeypatch.setenv("HOME", "/root")
    is_dir, access = Path.is_dir, os.access

    def refused(path: Path, *arguments: object) -> bool:
        if str(path).startswith("/root/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refused)  # nothing is refused to root
    monkeypatch.setattr(os.path, "isdir", lambda path: not str(path).startswith("/root/"))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/root" and access(path, mode))
    cannot = [f"/root/.cache/{name} cannot be written" for name in ("edmdistill", "huggingface/hub")]
    assert [finding.detail for finding in resources.check_disk()][1:] == cannot
    assert only_finding(check_evaluations).level == "ok"


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch):
    assert only_finding(resources.check_temporary_files).level == "ok"
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert only_finding(resources.check_temporary_files).fix == "set TMPDIR to one that can"


@pytest.mark.parametrize(("free", "level"), [(1 / 16, "warn"), (8, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: float, level: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(total=free * GIB, free=free * GIB))
    finding = only_finding(resources.check_shared_memory)
    assert finding.level == level
    assert ("--shm-size" in finding.fix) == (level == "warn")
