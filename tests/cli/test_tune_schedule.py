"""`edmdistill tune-schedule`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_generator import tiny_generator

from edmdistill.checkpoints.config import read_config
from edmdistill.cli import main
from edmdistill.evaluation import images

COMMON = "--n", "40", "--sets", "2", "--budget", "480", "--device", "cpu"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("made") / "generator")


def run(source: Path | str, *words: str) -> Result:
    return CliRunner().invoke(main, ["tune-schedule", str(source), *COMMON, *words])


def test_interrupted_it_goes_on_and_stores_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--nfe", "2", "--metric", "fd_digits", "--work", str(tmp_path / "work"))
    whole, stopped = (shutil.copytree(made, tmp_path / name) for name in ("whole", "stopped"))
    dry = run(whole, *words, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert read_config(whole) == read_config(made)
    tuning = json.loads(dry.stdout)["schedules"]["2"]
    assert tuning["confirmed"]
    assert (tuning["images"], tuning["schedules"]) == (480, 8)

    draw: Any = images.generate_images
    drawn: list[int] = []

    def generate(model: Any, spec: Any, seeds: Any, *args: Any, **options: Any) -> Any:
        if len(drawn) == 200:
            drawn.append(-1)
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return draw(model, spec, seeds, *args, **options)

    monkeypatch.setattr(images, "generate_images", generate)
    first = run(stopped, *words)
    assert first.exit_code == 130
    assert "Interrupted: nothing is stored yet; the same command goes on" in first.stderr
    assert read_config(stopped) == read_config(made)
    second = run(stopped, *words)
    assert second.exit_code == 0, second.output
    assert len(drawn) == 481
    assert "80 2.515 -> 80 " in second.stdout
    assert f"{stopped} is changed" in second.stderr
    assert list(read_config(stopped).sampling.sigmas["2"]) == tuning["sigmas"]
    assert read_config(stopped).tunings["2"].values == tuple(tuning["values"])
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nfe", "1", "--metric", "fd_digits"], "1 is not in the range 2<=x<=64"),
        (["--nfe", "2"], "neither a metric nor a protocol is named: add --protocol"),
        (["--nfe", "2", "--metric", "kid"], "no protocol measures kid: add --protocol"),
        (["--nfe", "2", "--protocol", "digits", "--metric", "fd_digit"], "there is no metric 'fd_digit'"),
        (["--nfe", "2", "--protocol", "digits", "--weights", "raw"], "leave out --weights raw"),
        (["--nfe", "2", "--protocol", "digits", "--budget", "60"], "a budget of 60 images for 2 steps is too small"),
        (["--nfe", "2", "--protocol", "digits", "--sets", "1"], "1 is not in the range 2<=x<=100"),
    ],
)
def test_mistakes(made: Path, tmp_path: Path, words: list[str], message: str) -> None:
    before = (made / "config.json").read_bytes()
    result = run(made, *words, "--work", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert (made / "config.json").read_bytes() == before


def test_the_help_does_not_offer_what_is_refused() -> None:
    assert re.search(r"\braw\b", CliRunner().invoke(main, ["tune-schedule", "--help"]).stdout) is None


def test_other_sources_are_refused(tmp_path: Path) -> None:
    result = run("digits", "--nfe", "2", "--metric", "fd_digits")
    assert (result.exit_code, "digits is no folder here" in result.stderr) == (2, True)
    result = run(tmp_path, "--nfe", "2", "--metric", "fd_digits")
    assert (result.exit_code, "is not a checkpoint because it has no config.json" in result.stderr) == (2, True)
