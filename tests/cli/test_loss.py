"""edmdistill loss."""

import json
from pathlib import Path

from click.testing import CliRunner

from edmdistill.cli import main

TEACHER = str(Path(__file__).parents[2] / "edmdistill" / "assets" / "digits-teacher.pkl")


def test_text_and_json() -> None:
    command = ["loss", TEACHER, TEACHER, "--data", "digits", "--images", "20", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["sigma", "teacher", "original", "ratio"]
    assert result.stdout.count("1.0000") == 7
    assert "is as good as the second" in result.stdout
    document = json.loads(CliRunner().invoke(main, [*command[:2], *command[3:], "--json"]).stdout)
    assert [len(row["losses"]) for row in document["losses"]] == [1] * 7
