"""What the doctor sees, in machines and packages that are broken for the purpose."""

import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from edmdistill.kernels.dual import RULES, Dual
from edmdistill.machine import doctor, host
from edmdistill.machine.doctor import Finding
from edmdistill.machine.host import host_memory

DISK = types.SimpleNamespace


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """package(name, version, code): an installed distribution of that name, as this process and others see it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def install(name: str, version: str, code: str = "", requires: tuple[str, ...] = ()) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")

    return install


def only(check: doctor.Check) -> Finding:
    (finding,) = check()
    return finding


def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every check runs here; none may fail but for want of room."""
    monkeypatch.chdir(tmp_path)
    findings = list(doctor.diagnose())
    names = [finding.check for finding in findings]
    assert {"python", "edmdistill", "numpy", "torch", "locks", "forward derivative", "gloo"} <= set(names)
    assert len(names) == len(set(names))
    room = {"memory", "disk", "hub cache", "shared memory"}
    assert [finding for finding in findings if finding.level == "fail" and finding.check not in room] == []
    for finding in findings:
        assert finding.detail
        assert bool(finding.fix) == (finding.level != "ok")
        assert "\n" not in finding.detail + finding.fix
    assert not list(tmp_path.iterdir())


def test_requirements(package):
    package("old", "1.9.0+local")
    package("late", "3.0")
    package("pre", "2.1.dev0")
    requires = ("old>=2.6", "late<3,>=1", "pre>=2.0", "absent-for-a-test>=1.5", "dev-only; extra == 'dev'")
    package("edmdistill", "0.0", requires=requires)
    found = {finding.check: finding for finding in doctor.check_requirements()}
    assert {name: finding.level for name, finding in found.items()} == {
        "old": "fail",
        "late": "fail",
        "pre": "ok",
        "absent-for-a-test": "fail",
    }
    assert found["old"].detail == "1.9.0+local, but >=2.6 is needed"
    assert found["absent-for-a-test"].fix == "pip install 'absent-for-a-test>=1.5'"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_package_that_does_not_fit_torch(package, name: str, code: str, reason: str):
    package(name, "0.1", code)
    found = {finding.check: finding for finding in doctor.check_image_packages()}
    assert found[name].level == "fail"
    assert f"0.1 does not match torch {torch.__version__}" in found[name].detail
    assert reason in found[name].detail
    assert f"pip uninstall {name}" in found[name].fix


def test_a_package_that_fits(package):
    package("timm", "1.0")
    assert Finding("timm", "ok", "1.0") in doctor.check_image_packages()


@pytest.mark.parametrize(("name", "level"), [("dnnlib", "warn"), ("torch_utils", "warn"), ("torchinfo", "ok")])
def test_namesakes(package, name: str, level: str):
    package(name, "0.1")
    finding = only(doctor.check_namesakes)
    assert finding.level == level
    assert (name in finding.detail) == (level == "warn")


def test_without_torch_nothing_asks_for_it(package, monkeypatch: pytest.MonkeyPatch):
    package("torch", "2.13.0", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    checks = {name: doctor.CHECKS[name] for name in ("python", "torch")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    *_, last = doctor.diagnose()
    assert last.check == "torch"
    assert last.level == "fail"
    assert last.detail == "cannot be imported: ImportError: libcudart.so.13: cannot open shared object file"


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch):
    def broken():
        yield Finding("a", "ok", "found")
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "python": doctor.check_python})
    monkeypatch.setattr(doctor, "TORCH_CHECKS", {})
    findings = list(doctor.diagnose())
    assert [finding.check for finding in findings] == ["a", "broken", "python", "edmdistill"]
    assert findings[1].level == "fail"
    assert findings[1].detail == "could not be checked: ZeroDivisionError: one"


@pytest.mark.parametrize(("free", "level"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, level: str):
    asked = []

    def usage(path: Path) -> DISK:
        asked.append(path)
        return DISK(total=100 * doctor.GIB, free=free * doctor.GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "made"))
    monkeypatch.chdir(tmp_path)
    assert [finding.level for finding in doctor.check_disk()] == [level, level]
    assert asked == [tmp_path, tmp_path]


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
    assert doctor._hub_cache() == Path(folder)


@pytest.mark.parametrize(("free", "level"), [(2, "warn"), (8, "ok")])
def test_memory_within_a_control_group(monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    files = {
        "/proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n",
        "/sys/fs/cgroup/memory.max": f"{10 * doctor.GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{(10 - free) * doctor.GIB}\n",
    }
    monkeypatch.setattr(host, "read_system_file", files.__getitem__)
    finding = only(doctor.check_memory)
    assert finding.level == level
    assert finding.detail.startswith(f"{free:.1f} of 10.0 GiB free, ")
    files |= {"/sys/fs/cgroup/memory.max": "max\n"}
    assert host_memory()[1] == 32 * doctor.GIB


def test_locks_that_keep_nobody_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert only(doctor.check_locks).level == "ok"
    monkeypatch.setattr(doctor.fcntl, "flock", lambda file, operation: None)
    assert only(doctor.check_locks).detail == f"locks in {tmp_path} have no effect"

    def refused(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(doctor.fcntl, "flock", refused)
    assert only(doctor.check_locks).detail == f"files in {tmp_path} cannot be locked: No locks available"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("free", "level"), [(1 / 16, "warn"), (8, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: float, level: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(total=free * doctor.GIB, free=free * doctor.GIB))
    finding = only(doctor.check_shared_memory)
    assert finding.level == level
    assert ("--shm-size" in finding.fix) == (level == "warn")


@pytest.mark.parametrize(
    ("driver", "cuda", "level", "part"),
    [
        (False, None, "ok", "no CUDA device"),
        (False, "13.0", "ok", "no CUDA device"),
        (True, None, "warn", "CPU-only build"),
        (True, "13.0", "fail", "sees no GPU"),
    ],
)
def test_no_device(monkeypatch: pytest.MonkeyPatch, driver: bool, cuda: str | None, level: str, part: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    finding = only(doctor.check_devices)
    assert finding.level == level
    assert part in finding.detail


def test_devices(monkeypatch: pytest.MonkeyPatch):
    """Two devices, by hand: one sound, one that this torch has no kernels for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * doctor.GIB, 24 * doctor.GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (3, 7)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["H", "K"][index])
    ones = torch.ones

    def made(size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("no kernel image is available\nmore")
        return ones(size)

    monkeypatch.setattr(torch, "ones", made)
    first, second = doctor.check_devices()
    assert first == ("cuda:0", "ok", "H, 10.0 of 24.0 GiB free, compute capability 9.0, with bf16", "")
    assert second[:2] == ("cuda:1", "fail")
    assert second.detail.endswith("capability 3.7, without bf16: no kernel image is available")


@pytest.mark.gpu
def test_devices_of_this_machine():
    for check in (doctor.check_devices, doctor.check_tangents, doctor.check_distributed):
        assert all(finding.level == "ok" for finding in check())


def test_a_wrong_derivative_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = RULES["linear"]

    def wrong(*arguments: object) -> Dual:
        found = right(*arguments)
        return Dual(found.value, found.tangent * 1.1)

    monkeypatch.setitem(RULES, "linear", wrong)
    finding = only(doctor.check_tangents)
    assert finding.level == "fail"
    assert re.search(r"at most \de-0\d, in \w", finding.detail)


def test_no_group_of_processes(monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail] unable to resolve hostname\nat device.cc")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    finding = only(doctor.check_distributed)
    assert finding.level == "fail"
    assert finding.detail == "cannot make a process group: [enforce fail] unable to resolve hostname"
    assert "GLOO_SOCKET_IFNAME" in finding.fix
