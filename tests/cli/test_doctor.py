"""edmdistill doctor."""

import json

import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.machine import doctor
from edmdistill.machine.checks.finding import Finding

WELL = [Finding("python", "ok", "3.12"), Finding("disk", "warn", "2 GiB free", "make room")]
ILL = [*WELL, Finding("torch", "fail", "not installed", "pip install torch")]


@pytest.mark.parametrize(("findings", "exit_code"), [(WELL, 0), (ILL, 2)])
def test_lines_and_json(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], exit_code: int):
    monkeypatch.setattr(doctor, "run_checks", lambda: iter(findings))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == exit_code
    lines = result.stdout.splitlines()
    assert len(lines) == len(findings)
    assert lines[0].split() == ["ok", "python", "3.12"]
    assert lines[1].endswith("2 GiB free; make room")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == exit_code
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["failed"] == (exit_code == 2)
    assert document["checks"] == [finding._asdict() for finding in findings]


def test_each_line_comes_as_it_is_known(monkeypatch: pytest.MonkeyPatch):
    def breaks_off():
        yield from WELL
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "run_checks", breaks_off)
    assert len(CliRunner().invoke(main, ["doctor"]).stdout.splitlines()) == 2
