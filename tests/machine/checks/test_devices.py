"""Devices, derivatives and process groups, sound and not."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_findings import only_finding

from edmdistill.kernels.dual import RULES
from edmdistill.machine.checks import devices
from edmdistill.machine.checks.finding import GIB


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
    finding = only_finding(devices.check_devices)
    assert finding.level == level
    assert part in finding.detail


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_a_cpu_that_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert only_finding(devices.check_devices).detail.endswith("--dtype bfloat16`") == name.endswith("bf16")


def test_devices(monkeypatch: pytest.MonkeyPatch):
    """Two devices, by hand: one sound, one that this torch has no kernels for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (3, 7)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["H", "K"][index])
    ones = torch.ones

    def made(size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("no kernel image is available\nmore")
        return ones(size)

    monkeypatch.setattr(torch, "ones", made)
    first, second = devices.check_devices()
    assert first == ("cuda:0", "ok", "H, 10.0 of 24.0 GiB free, compute capability 9.0, with bf16", "")
    assert second[:2] == ("cuda:1", "fail")
    assert second.detail.endswith("capability 3.7, without bf16: no kernel image is available")


@pytest.mark.gpu
def test_devices_of_this_machine():
    for check in (devices.check_devices, devices.check_tangents, devices.check_distributed):
        assert all(finding.level == "ok" for finding in check())


def test_a_wrong_derivative_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = RULES["linear"]

    def wrong(*arguments: Any) -> Any:
        return right(*arguments) * 1.1

    monkeypatch.setitem(RULES, "linear", wrong)
    finding = only_finding(devices.check_tangents)
    assert finding.level == "fail"
    assert re.search(r"at most \de-0\d, in \w", finding.detail)


def test_no_group_of_processes(monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail] unable to resolve hostname\nat device.cc")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    finding = only_finding(devices.check_distributed)
    assert finding.level == "fail"
    assert finding.detail == "cannot make a process group: [enforce fail] unable to resolve hostname"
    assert "GLOO_SOCKET_IFNAME" in finding.fix
