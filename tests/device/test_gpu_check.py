"""benchmarks/gpu_check.py, as whoever has a GPU will run it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_parts import correctness, performance
from gpu_parts.shared import Setting

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
WORKER = """
import json, os, sys, time
def say(**line): print(json.dumps(line), flush=True)
for name in sys.argv[sys.argv.index("--parts") + 1:]:
    say(part=name, begins=True)
    say(part=name, found=1)
    if name == "golden": os.abort()
    if name == "methods": time.sleep(60)
    say(part=name, ends=True, ok=name != "resume", seconds=0.0)
"""
"""A worker of which one part crashes, one takes too long, and one finds something wrong."""


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_the_list_names_every_part(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--list"])
    gpu_check.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_check.PARTS)
    assert all(len(line.split()) > 5 for line in lines)
    assert sum(gpu_check.PARTS[name].limit for name in gpu_check.DEFAULT) <= 8 * 60


def test_no_part_stops_the_next(gpu_check: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setitem(gpu_check.PARTS, "methods", gpu_check.PARTS["methods"]._replace(limit=0.5))
    written: list[dict[str, Any]] = []
    names = ["environment", "golden", "methods", "resume", "options"]
    assert not gpu_check.watch(names, "cuda", written.append)
    ends = {line["part"]: line for line in written if line.get("ends")}
    assert list(ends) == names
    assert [ends[name]["ok"] for name in names] == [True, False, False, False, True]
    assert (ends["golden"]["error"], ends["methods"]["error"]) == ("the process died", "it took too long")
    assert gpu_check.watch(["environment", "options"], "cuda", written.append)


@pytest.mark.parametrize(
    ("losses", "checks"),
    [
        ({"off": [1.0, 2.0], "default": [1.0, 2.001]}, {"off": None, "default": True}),
        ({"off": [1.0, 2.0], "default": [1.0, 2.1]}, {"off": None, "default": False}),
        ({"off": [1.0], "default": [1.0, 2.0]}, {"off": None, "default": False}),  # a run that ended early
        ({"off": [], "default": [1.0, 2.0]}, {"off": False}),  # nothing to compare with
    ],
)
def test_compiled_rounds_are_checked_and_plain_ones_are_not(
    gpu_check: ModuleType,
    losses: dict[str, list[float]],
    checks: dict[str, bool | None],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    def rounds(mode: str) -> Any:
        if not losses[mode]:
            raise RuntimeError("a fault")
        return ({"loss/generator": loss} for loss in losses[mode])

    monkeypatch.setattr(performance, "digits_run", lambda setting, method, number, compile: compile)
    monkeypatch.setattr(performance, "seconds_of", lambda act, setting: 1.0)
    monkeypatch.setattr("edmdistill.training.loop.rounds", rounds)
    found: dict[str, dict[str, bool | None]] = {}
    for line in performance.compile_modes(Setting("cpu", False, tmp_path)):
        found.setdefault(line["method"], {})[line["mode"]] = line.get("ok")
        assert ("error" in line) == (line.get("ok") is not None)
    assert found == {"cosim": checks, "scd": checks}


@pytest.mark.slow
def test_it_runs_on_the_emulated_device(gpu_check: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(SCRIPT), "--device", "emulated", "--out", str(out)]
    found = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line for line in lines if not line.get("ok", True)] == [], found.stderr
    assert found.returncode == 0, found.stderr
    assert sum(line.get("ends", False) for line in lines) == len(gpu_check.DEFAULT)


class Cuda(str):
    """The CPU by the name of a GPU: what the script does for CUDA alone is done."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda with what the script asks of it.  Returns: the modes in which waits are debugged, as they are set."""
    modes: list[str] = []
    properties = SimpleNamespace(name="a GPU", total_memory=10**12)
    functions: dict[str, Any] = {
        "synchronize": lambda: None,
        "get_device_properties": lambda device: properties,
        "set_sync_debug_mode": modes.append,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    profile = torch.profiler.profile

    def of_the_cpu(activities: list[Any]) -> Any:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        return profile(activities=[torch.profiler.ProfilerActivity.CPU])

    monkeypatch.setattr(torch.profiler, "profile", of_the_cpu)
    monkeypatch.setattr("edmdistill.machine.devices.named_device", lambda name: torch.device("cpu"))
    return modes


def test_the_card_is_measured(gpu_check: ModuleType, cuda: list[str], tmp_path: Path) -> None:
    _, card, rates = correctness.environment(Setting(Cuda("cpu"), False, tmp_path))
    assert (card["name"], card["memory"]) == ("a GPU", 10**12)
    assert rates["bf16 FLOP/s"] > 0


def test_what_a_card_cannot_hold_is_skipped(
    gpu_check: ModuleType, cuda: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    monkeypatch.setattr(performance, "PLANNED", {"EDM2-S": performance.PLANNED["EDM2-S"]})
    (line,) = performance.memory(Setting(Cuda("cpu"), False, tmp_path))
    assert line["planned"] > 1
    assert line["skipped"] == "more than this card holds"


@pytest.mark.slow
def test_what_is_for_cuda_alone_runs(
    gpu_check: ModuleType, cuda: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edmdistill.methods.METHODS", {"scd": None})
    monkeypatch.setattr(performance, "SPEEDS", {"scd EDM2-S": performance.SPEEDS["scd EDM2-S"]})
    setting = Setting(Cuda("cpu"), False, tmp_path)
    (trained,) = correctness.methods(setting)
    assert trained["ok"], trained
    assert cuda[0] == "error"
    assert cuda[-1] == "default"
    assert cuda[1:-1] == ["default", "error"] * (len(cuda) // 2 - 1)
    trained, kernels = performance.speed(setting)
    assert trained["of the peak"] > 0
    assert len(kernels["kernels"]) == 20


@pytest.mark.slow
def test_tritons_kernels_are_compared(
    gpu_check: ModuleType, cuda: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    shapes = {"attention": ((2, 1, 9, 8),), "group_norm_silu": ((2, 32, 4, 4),)}
    monkeypatch.setattr(performance, "KERNEL_SHAPES", shapes)
    lines = list(performance.kernels(Setting(Cuda("cpu"), False, tmp_path)))
    assert len(lines) == 6
    assert all(line["ok"] for line in lines if "float32" in line["dtype"])
