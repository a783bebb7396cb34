"""Where commands that measure differ: guides, likelihoods, plots, tunings, several processes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.evaluation import tune
from edmdistill.evaluation.measurements import Measurements
from edmdistill.machine import launch
from edmdistill.sampling.heun import Churn
from edmdistill.sampling.tune import TuningPlan


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A generator, a teacher, a guide, and a folder of two images."""
    root = tmp_path_factory.mktemp("made")
    (root / "images").mkdir()
    for name in "01":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "images" / f"{name}.png")
    made = {stage: tiny_generator(root / stage, stage) for stage in ("generator", "teacher")}
    guide = tiny_generator(root / "guide", "teacher", scale=2)
    return made | {"guide": guide, "images": root / "images"}


def recorder(calls: list[Any]) -> Callable[..., Measurements]:
    def record(*args: Any, **options: Any) -> Measurements:
        calls.append((args, options))
        return Measurements([], 0)

    return record


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_a_guide_computes_as_the_network_does(
    command: str, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("edmdistill.evaluation.measurements.measure_network", recorder(calls))
    words = [sources["teacher"], "--protocol", "digits", "--nfe", 3, "--guide", sources["guide"], "--guidance", 1.5]
    words += ["--dtype", "float64", "--device", "cpu"]
    churn = ["--churn", 40, "--churn-min", 0.05, "--churn-max", 50, "--churn-noise", 1.003] if command == "eval" else []
    assert call(command, *words, *churn).exit_code == 0
    (sampler,) = calls[0][1]["samplers"]
    assert sampler.guide.flow.dtype == torch.float64
    assert (sampler.nfe, sampler.guidance) == (3, 1.5)
    assert sampler.churn == (Churn(40, 0.05, 50, 1.003) if churn else Churn())


def test_options_of_a_likelihood_reach_it(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("edmdistill.evaluation.measurements.measure_likelihood", recorder(calls))
    words = ["eval", sources["teacher"], "--metrics", "nll", "--device", "cpu"]
    assert call(*words, "--ref", "digits").exit_code == 0
    assert (
        call(*words, "--ref", "digits", "--split", "all", "--n", 9, "--probes", 3, "--tolerance", 0.01).exit_code == 0
    )
    assert call(*words, "--ref", sources["images"]).exit_code == 0
    assert [(data.name, data.split) for (_, data), _ in calls] == [
        ("digits", "test"),
        ("digits", "all"),
        (str(sources["images"]), "train"),
    ]
    usual = {"count": None, "probes": 4, "tolerance": 1e-5, "source": str(sources["teacher"]), "raw": False}
    assert calls[0][1] == usual
    assert calls[1][1] == usual | {"count": 9, "probes": 3, "tolerance": 0.01}


def test_a_sweep_is_written_and_drawn(sources: dict[str, Path], tmp_path: Path) -> None:
    words = ["--protocol", "digits", "--nfe", 1, "--n", 4, "--device", "cpu"]
    files = [tmp_path / name for name in ("a.json", "b.SVG", "c.html")]
    assert call("sweep", sources["generator"], *words, "--out", files[0], "--plot", files[1]).exit_code == 0
    shown = call("sweep", sources["generator"], *words, "--out", files[2]).stdout
    assert files[0].read_text().startswith("{")
    assert files[1].read_text().startswith("<svg")
    assert str(sources["generator"]) in files[2].read_text()
    assert shown.startswith("Protocol digits, 4 images.")


def test_a_sweep_is_of_a_network(sources: dict[str, Path]) -> None:
    refused = call("sweep", sources["images"], "--protocol", "digits", "--nfe", 1)
    assert (refused.exit_code, "images is images: measure them with eval" in refused.stderr) == (2, True)


def test_options_of_a_tuning_reach_it(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    stored: list[Path] = []
    monkeypatch.setattr(tune, "tune_schedules", lambda *args: calls.append(args) or {})
    monkeypatch.setattr(tune, "store_tunings", lambda folder, tunings: stored.append(folder) or False)
    words = ["tune-schedule", sources["generator"], "--nfe", "4,2", "--metric", "class_accuracy", "--device", "cpu"]
    words += ["--family", "curve", "--n", 50, "--sets", 2, "--budget", 900, "--work", tmp_path / "work"]
    assert call(*words, "--dry-run").exit_code == 0
    assert not stored
    done = call(*words)
    assert (done.exit_code, done.stderr) == (0, ""), "nothing is stored, and nothing said of it"
    assert stored == [sources["generator"]]
    for evaluate, folder, nfes, plan, _ in calls:
        assert evaluate.keywords["metrics"] == ["class_accuracy"]
        assert (folder, nfes, plan) == (
            sources["generator"],
            [4, 2],
            TuningPlan(family="curve", n=50, sets=2, images=900),
        )


@pytest.mark.parametrize(
    "words",
    [["eval", "--protocol", "digits"], ["sweep", "--protocol", "digits", "--nfe", 1], ["tune-schedule", "--nfe", 2]],
)
def test_several_processes_run_the_same_command(
    words: list[Any], sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def start(arguments: list[str], processes: int, *, device: str | None, on_message: Callable[[str], object]) -> int:
        asked.append((arguments, processes, device))
        on_message("they are started")
        return 7

    monkeypatch.setattr(launch, "launch", start)
    command, *rest = map(str, words)
    plain = [command, str(sources["generator"]), *rest, "--metric" if command == "tune-schedule" else "--metrics"]
    plain += ["fd_digits", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["edmdistill", *plain, "--processes", "2"])
    result = call(*plain, "--processes", 2)
    assert (result.exit_code, result.stdout) == (7, "")
    assert asked == [(plain, 2, "cpu")]
    assert "they are started" in result.stderr
