"""GPUs by their names and by measurement."""

from types import SimpleNamespace

import pytest
import torch

from edmdistill.machine import gpus
from edmdistill.machine.gpus import LAUNCH, find_gpu, measure_this_machine


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100"),
        ("NVIDIA H100 NVL", 100.6e9, None),
        ("NVIDIA H200", 150.1e9, "h200"),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.0e9, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 25.3e9, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16.8e9, None),
        ("NVIDIA RTX 6000 Ada Generation", 50.9e9, "rtx6000-ada"),
        ("Tesla T4", 15.6e9, None),
    ],
)
def test_the_name_and_the_memory_tell_a_gpu(name: str, memory: float, key: str | None) -> None:
    assert find_gpu(name, memory) == key


def test_the_current_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ones, waits = torch.ones, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8e9))
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype=torch.float32: ones(4, 4, dtype=dtype))
    gpu = measure_this_machine.__wrapped__()
    assert gpu.memory == 8e9
    assert min(gpu.half, gpu.tf32, gpu.single) > 0
    assert gpu.launch >= LAUNCH
    assert len(waits) == 4 * 3  # before each reading of the clock, of four measurements


@pytest.mark.parametrize(("call", "launch"), [(1e-3, 1e-3), (1e-7, LAUNCH)])
def test_the_cpu_is_measured_by_the_fastest_of_three(
    call: float, launch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first product, which takes long. The clock moves by what is computed alone."""
    now, took = [0.0], iter(())

    class Matrix:
        def __init__(self, rows: int, columns: int = 1, *, device: str, dtype: torch.dtype = torch.float32) -> None:
            nonlocal took
            unit = 2 * rows**3 * (1e-9 if dtype == torch.bfloat16 else 4e-9)  # 1 and 0.25 GFLOP/s
            took = iter([1000.0, 3 * unit, 2 * unit, unit])
            assert device == "cpu"

        def __matmul__(self, other: object) -> None:
            now[0] += next(took)

        def __add__(self, other: object) -> None:
            now[0] += call

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(gpus.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("edmdistill.machine.host.host_memory", lambda: (8e9, 1e9))
    measured = measure_this_machine.__wrapped__()
    assert measured == (8e9, pytest.approx(1e9), *2 * [pytest.approx(0.25e9)], pytest.approx(launch))
