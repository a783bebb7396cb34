"""A device that is not there: every command says so in one sentence before any work, and none takes another."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.errors import EdmDistillError
from edmdistill.machine.devices import named_device, pick_device
from edmdistill.machine.engine import Engine, Machine

COMMANDS = {
    "train": ["train", "diffusion", "--data", "digits", "--recipe", "diffusion/digits", "--run-dir", "run"],
    "train in processes": [
        *["train", "diffusion", "--data", "digits", "--recipe", "diffusion/digits", "--run-dir", "run"],
        *["--processes", "2"],
    ],
    "loss": ["loss", "teacher", "--data", "digits"],
    "sample": ["sample", "teacher", "--out", "out"],
    "sweep": ["sweep", "teacher", "--protocol", "digits", "--ref", "digits", "--nfe", "1"],
    "eval": ["eval", "teacher", "--protocol", "digits", "--ref", "digits"],
}
NOT_HERE = ["foo", "cuda:", "cuda:-1", "cuda:x", "mps", "meta", "CPU", "", "xla:0", "cuda:99999999999999999999"]


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_no_device(name: str):
    with pytest.raises(EdmDistillError, match=r"there is no device .* use cpu, cuda, or cuda:N"):
        pick_device(name)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert pick_device(None) == pick_device("cpu") == torch.device("cpu")
    for name in "cuda", "cuda:0":
        with pytest.raises(EdmDistillError, match=f"{name} cannot be used because torch finds no CUDA device here"):
            pick_device(name)


def test_the_gpus_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert named_device(None) == named_device("cuda") == torch.device("cuda")
    assert named_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EdmDistillError, match=r"there is no cuda:2: this machine has 2 GPUs, cuda:0 to cuda:1"):
        named_device("cuda:2")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EdmDistillError, match="this machine has 1 GPU, too few for process 2: start no more"):
        Engine(Machine("cuda"))


@pytest.mark.parametrize("device", ["cuda", "foo"])
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses(
    words: list[str], device: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    words = [str(teacher) if word == "teacher" else word for word in words]
    result = CliRunner().invoke(main, [*words, "--device", device])
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith("Error: ")
    assert ("there is no device 'foo'" if device == "foo" else "torch finds no CUDA device here") in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--micro-batch", "auto"], "--micro-batch auto needs a GPU, but this run is on the CPU: use a number"),
        (["--fit", "auto"], "--fit auto needs a GPU, but this run is on the CPU: name the memory"),
        (["--micro-batch", "0"], "--micro-batch 0 is not a number of images"),
        (["--set", "training.batch=0"], "training.batch = 0 must be at least 1"),
        (["--recipe", "diffusion/digitz"], "did you mean"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_processes_are_not_started_to_refuse_an_option(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    result = CliRunner().invoke(main, [*COMMANDS["train in processes"], "--device", "cpu", *options])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Starting" not in result.stderr
