"""edmdistill diagnose."""

import json
from pathlib import Path

from click.testing import CliRunner
from tiny_generator import tiny_generator

from edmdistill.cli import main
from edmdistill.evaluation.diagnosis import JUMP_SIGMAS


def test_a_generator_is_diagnosed_as_a_table_and_as_json(tmp_path: Path):
    command = ["diagnose", str(tiny_generator(tmp_path / "generator")), "--protocol", "digits", "--n", "20"]
    lines = CliRunner().invoke(main, command, catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(JUMP_SIGMAS) + 1]] == [f"{sigma:g}" for sigma in JUMP_SIGMAS]
    assert lines[-1].endswith(".")
    document = json.loads(CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False).stdout)
    assert [jump["sigma"] for jump in document["jumps"]] == list(JUMP_SIGMAS)
    assert [f"{jump['generator']:.3g}" for jump in document["jumps"]] == [line.split()[1] for line in lines[1:9]]
    assert document["sentences"] == lines[len(JUMP_SIGMAS) + 1 :]


def test_a_teacher_cannot_be_diagnosed(tmp_path: Path):
    teacher = tiny_generator(tmp_path / "teacher", stage="teacher")
    result = CliRunner().invoke(main, ["diagnose", str(teacher), "--protocol", "digits"])
    assert result.exit_code == 2
    assert "is a teacher, not a generator" in result.stderr
