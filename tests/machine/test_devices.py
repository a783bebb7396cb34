"""Devices by their names, where GPUs are only said to be; faults/test_devices.py has the commands."""

import pytest
import torch

from edmdistill.errors import EdmDistillError
from edmdistill.machine.devices import named_device, named_dtype, pick_device, process_device


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs; gets those that became the current one, and the device of every first tensor."""
    became: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", became.append)
    monkeypatch.setattr(torch, "empty", lambda size, device: became.append(device))
    return became


def test_a_gpu_with_a_number_becomes_the_current_one(current: list[torch.device]) -> None:
    """And no tensor is made before it has."""
    gpu, any_gpu, cpu = torch.device("cuda:1"), torch.device("cuda"), torch.device("cpu")
    assert pick_device("cuda:1") == gpu
    assert current == [gpu, gpu]
    assert (pick_device("cuda"), pick_device(None), pick_device("cpu")) == (any_gpu, any_gpu, cpu)
    assert current[2:] == [any_gpu, any_gpu, cpu]


@pytest.mark.parametrize(
    ("name", "rank", "picked"),
    [
        ("cuda", None, "cuda"),
        ("cuda", "1", "cuda:1"),
        (None, "1", "cuda:1"),
        (None, "0", "cuda:0"),
        ("cuda:0", "1", "cuda:0"),
        ("cpu", "7", "cpu"),
    ],
)
def test_each_process_has_its_own_gpu(
    name: str | None, rank: str | None, picked: str, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert process_device(name) == torch.device(picked)


def test_processes_without_a_gpu_share_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_device(None) == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(size: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "empty", unusable)
    with pytest.raises(EdmDistillError) as caught:
        pick_device("cuda:1")
    assert str(caught.value) == (
        "cuda:1 cannot be used here (CUDA error: no kernel image is available): choose another --device"
    )


def test_the_one_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert named_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(EdmDistillError, match=r"there is no cuda:1: this machine has one GPU, cuda:0$"):
        named_device("cuda:1")


def test_dtypes() -> None:
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64, None: "auto"}
    for device in (torch.device("cpu"), torch.device("cuda:1")):
        assert {name: named_dtype(name, device) for name in dtypes} == dtypes
    assert named_dtype("tf32", torch.device("cuda:1")) == torch.float32
    with pytest.raises(EdmDistillError, match=r"tf32 is for CUDA, and this runs on the CPU: use float32$"):
        named_dtype("tf32", torch.device("cpu"))
