"""Ctrl-C in a measurement: one line that says what is kept and what is lost, and 130."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_generator import tiny_generator

from edmdistill.cli import main
from edmdistill.evaluation import measurements, noise_levels
from edmdistill.evaluation.results import load_results


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_generator(tmp_path / "generator")


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    whole, calls = measurements.evaluate, []

    def evaluate(*args: Any, **options: Any) -> Any:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(measurements, "evaluate", evaluate)


def run(command: str, *words: object) -> Result:
    return CliRunner().invoke(main, [command, *map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_what_is_measured_is_shown_written_and_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    stop_after(monkeypatch, 2)
    out = tmp_path / "results.json"
    words = [source, "--protocol", "digits", "--n", 4, "--nfe", "1,2,3", "--save", "--out", out]
    result = run(command, *words)
    assert result.exit_code == 130
    line = "Interrupted: 2 of 3 measurements are done and saved; the same command goes on with what is kept in "
    assert line in result.stderr
    assert len(load_results(source)) == 2
    assert out.read_text().count('"metrics": {') == 2
    assert result.stdout


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_nothing_is_measured_yet(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    stop_after(monkeypatch, 0)
    result = run(command, source, "--protocol", "digits", "--nfe", "1", "--out", tmp_path / "a.json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.startswith("Interrupted: no measurement is done yet; the same command goes on with what is")
    assert not (tmp_path / "a.json").exists()


def test_loss(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(noise_levels, "losses_by_noise", stop)
    result = run("loss", source, "--data", "digits")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "Interrupted: nothing is measured yet.\n"
