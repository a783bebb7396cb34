"""edmdistill loss."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.evaluation import noise_levels
from edmdistill.evaluation.noise_levels import NoiseLevelLoss

TEACHER = str(Path(__file__).parents[2] / "edmdistill" / "assets" / "digits-teacher.pkl")


def test_text_and_json() -> None:
    command = ["loss", TEACHER, TEACHER, "--data", "digits", "--images", "20", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["sigma", "teacher", "original", "ratio"]
    assert result.stdout.count("1.0000") == 7
    assert "is as good as the second" in result.stdout
    alone = [*command[:2], *command[3:]]
    assert "second" not in CliRunner().invoke(main, alone).stdout
    document = json.loads(CliRunner().invoke(main, [*alone, "--json"]).stdout)
    assert document["sources"] == [TEACHER]
    assert [len(row["losses"]) for row in document["losses"]] == [1] * 7


def test_its_options_reach_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    row = NoiseLevelLoss(0.2, (3.0, 2.0))
    monkeypatch.setattr("edmdistill.cli.loss.say_unfinished", lambda *sources: None)  # there are no such files
    monkeypatch.setattr(noise_levels, "losses_by_noise", lambda *args, **more: asked.append((args, more)) or [row])
    command = ["loss", "mine", "theirs", "--data", "digits", "--split", "test", "--images", "20", "--batch", "7"]
    result = CliRunner().invoke(main, [*command, "--device", "cpu", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == {
        "schema_version": 1, "sources": ["mine", "theirs"], "losses": [{"sigma": 0.2, "losses": [3.0, 2.0]}]
    }  # fmt: skip
    options = {"split": "test", "images": 20, "batch": 7, "device": torch.device("cpu")}
    assert asked == [((["mine", "theirs"], "digits"), options)]
