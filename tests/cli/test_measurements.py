"""What eval, sweep and tune-schedule share: options on their way to the measurement, and what is said of results."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.atomic import sha256_file
from edmdistill.cli import measurements
from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.evaluation.measurements import Measurements
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import Result as Measurement
from edmdistill.evaluation.shards import ONE_PROCESS
from edmdistill.sampling import decode
from edmdistill.sampling.spec import SamplerRecord


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("made") / "generator")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What measurements of networks are asked for; none is made."""
    calls: list[dict[str, Any]] = []

    def record(*args: Any, **options: Any) -> Measurements:
        names = "model", "data", "protocol"
        calls.append(dict(zip(names, args, strict=True)) | options)
        return Measurements([], 0)

    monkeypatch.setattr("edmdistill.evaluation.measurements.measure_network", record)
    return calls


def test_options_reach_the_measurement(generator: Path, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    words = [generator, "--protocol", "pixels", "--ref", "digits", "--metrics", "fd_pixels, fd_digits", "--repeat", 3]
    words += ["--weights", "digits=a.safetensors", "--seeds", "5-9", "--dtype", "float64", "--device", "cpu"]
    words += ["--work", tmp_path / "work"]
    assert call("eval", *words, "--nfe", "2,1", "--gamma", 0.5).exit_code == 0
    assert call("sweep", *words, "--nfe", "2,1", "--gamma", "0.5").exit_code == 0
    for one in asked:
        samplers = one["samplers"]
        assert [(sampler.nfe, sampler.gamma) for sampler in samplers] == [(2, 0.5), (1, 0.5)]
        assert (one["protocol"].name, one["data"].name, one["metrics"]) == (
            "pixels",
            "digits",
            ["fd_pixels", "fd_digits"],
        )
        assert (list(one["seeds"]), one["repeat"], one["weights"]) == ([5, 6, 7, 8, 9], 3, {"digits": "a.safetensors"})
        assert (one["device"], one["work"].root, one["processes"]) == (
            torch.device("cpu"),
            tmp_path / "work",
            ONE_PROCESS,
        )
        assert (one["source"], one["raw"]) == (str(generator), False)
        assert one["source_sha256"] == sha256_file(generator / "model.safetensors")
        assert one["model"].flow.dtype == torch.float64
    call("eval", generator, "--protocol", "digits", "--n", 7, "--device", "cpu")
    assert (asked[-1]["seeds"], asked[-1]["metrics"], asked[-1]["repeat"]) == (range(7), None, 1)
    call("eval", generator, "--protocol", "digits", "--device", "cpu")
    assert (asked[-1]["seeds"], [sampler.nfe for sampler in asked[-1]["samplers"]]) == (None, [None])
    both = call("eval", generator, "--protocol", "digits", "--n", 7, "--seeds", "0-6")
    assert (both.exit_code, "--n N means the seeds 0 to N - 1" in both.stderr) == (2, True)


def test_a_vae_is_that_of_the_option(
    generator: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def open_decoder(*args: object) -> object:
        opened.append(args)
        return SimpleNamespace(note="the VAE says so")

    monkeypatch.setattr(decode, "open_decoder", open_decoder)
    said = call("eval", generator, "--protocol", "digits", "--vae", "my/vae", "--device", "cpu").stderr
    assert opened == [({"kind": "pixels"}, "my/vae", torch.device("cpu"))]
    assert asked[0]["decode"].note in said


def test_what_is_known_of_the_source_is_said(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    sentence = "is unfinished: 10 of 20 images seen."
    generator, teacher = (
        tiny_generator(tmp_path / stage, stage, images_seen=10, images_total=20) for stage in ("generator", "teacher")
    )
    (tmp_path / "few").mkdir()
    for name in "01":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "few" / f"{name}.png")
    (tmp_path / "few" / "why.txt").touch()
    words = ["--ref", tmp_path / "few", "--device", "cpu"]
    said = call("eval", generator, "--protocol", "pixels", *words).stderr
    assert sentence in said
    assert "why.txt" in said, "what is left out of the reference"
    assert sentence in call("eval", teacher, "--metrics", "nll", "--ref", "digits", "--n", 2, "--tolerance", 1).stderr
    assert "why.txt" in call("eval", tmp_path / "few", "--protocol", "pixels", "--ref", "digits").stderr


def test_images_are_of_the_references_classes(tmp_path: Path) -> None:
    rows, seeds = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 13])
    np.savez(tmp_path / "few.npz", images=rows, seeds=seeds, labels=seeds % 10)
    result = call("eval", tmp_path / "few.npz", "--protocol", "digits", "--json", "--device", "cpu")
    assert json.loads(result.stdout)["results"][0]["protocol"]["labels"] == "balanced", "of ten, not of four"


def measured(fd: float) -> Measurement:
    protocol = PROTOCOLS["digits"]
    return Measurement(
        metrics={"fd_digits": fd},
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="heun", nfe=35),
        provenance={},
    )


def fails(error: BaseException) -> Callable[..., Measurement]:
    def task(**_: object) -> Measurement:
        raise error

    return task


class Kept:
    """Stands for the work of a command."""

    root = Path("kept")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def remove(self) -> None:
        self.calls.append("remove")

    def close(self) -> None:
        self.calls.append("close")


def good(on_progress: Callable[[int], object]) -> Measurement:
    on_progress(5)
    return measured(4.0)


def test_all_that_is_measured_is_shown_and_nothing_kept() -> None:
    work, shown = Kept(), []
    measurements.measure(Measurements([("a", good), ("b", good)], 10, work), None, shown.extend)
    assert shown == [measured(4.0)] * 2
    assert work.calls == ["remove", "close"]


def test_what_is_not_finite_is_named_after_the_others_are_shown() -> None:
    work, shown = Kept(), []
    broken = [(name, fails(NotFiniteError(f"{name} is not finite"))) for name in "bc"]
    with pytest.raises(NotFiniteError, match=r"^b: b is not finite; c: c is not finite$"):
        measurements.measure(Measurements([("a", good), *broken], 15, work), None, shown.extend)
    assert shown == [measured(4.0)]
    assert work.calls == ["remove", "close"]
    with pytest.raises(NotFiniteError):
        measurements.measure(Measurements(broken, 10), None, fails(AssertionError()))  # nothing is shown


@pytest.mark.parametrize(
    ("tasks", "kept", "sentence"),
    [
        ("gs", True, "1 of 2 measurements is done; the same command goes on with what is kept in kept."),
        ("gs", False, "1 of 2 measurements is done; the measurement in progress is lost."),
        ("s", True, "no measurement is done yet; the same command goes on with what is kept in kept."),
    ],
)
def test_ctrl_c_shows_what_is_done_and_keeps_the_rest(tasks: str, kept: bool, sentence: str) -> None:
    work, shown = Kept() if kept else None, []
    kinds = {"g": good, "s": fails(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt, match=f"^{sentence}$"):
        measurements.measure(Measurements([(name, kinds[name]) for name in tasks], 10, work), None, shown.extend)
    assert len(shown) == tasks.count("g")
    assert work is None or work.calls == ["close"]


def test_ctrl_c_says_that_results_are_saved(tmp_path: Path) -> None:
    folder = tiny_generator(tmp_path / "generator")
    tasks = [("a", good), ("b", fails(KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt, match=r"^1 of 2 measurements is done and saved;"):
        measurements.measure(Measurements(tasks, 10), folder, lambda results: None)
    assert len(json.loads((folder / "config.json").read_text())["results"]) == 1


def test_images_have_no_average(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    for weights in ("ema", "raw"):
        refused = call("eval", tmp_path / "few.npz", "--protocol", "digits", "--weights", weights)
        assert (refused.exit_code, "--weights ema or raw is of a run" in refused.stderr) == (2, True)


def test_a_compiler_that_is_missing_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mode: str, device: torch.device) -> None:
        raise EdmDistillError(f"no compiler for {mode} on {device}")

    monkeypatch.setattr("edmdistill.machine.compile.require_compiler", refuse)
    result = call("eval", "nowhere", "--protocol", "digits", "--compile", "default", "--device", "cpu")
    assert (result.exit_code, result.stderr) == (2, "Error: no compiler for default on cpu\n")


@pytest.mark.parametrize("value", ["=w.pt", "inception=", "inception", ""])
def test_weights_are_of_a_run_or_of_a_feature_space(generator: Path, value: str) -> None:
    result = call("eval", generator, "--protocol", "digits", "--weights", value)
    assert (result.exit_code, f"{value!r} is neither ema, raw nor NAME=FILE" in result.stderr) == (2, True)
