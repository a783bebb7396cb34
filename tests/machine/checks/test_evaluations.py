"""Evaluations that were stopped and not taken up again: they are found, and removed on request alone."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.evaluation.shards import ONE_PROCESS, Work, evaluations_folder
from edmdistill.machine import doctor
from edmdistill.machine.checks.evaluations import check_evaluations


def test_what_is_abandoned_is_found_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "run_checks", check_evaluations)
    assert [finding.level for finding in check_evaluations()] == ["ok"]
    left, running = Work(evaluations_folder()), Work(evaluations_folder())
    folders = [work.folder({"of": name}, ONE_PROCESS) for work, name in ((left, "one"), (running, "another"))]
    left.close()
    (finding,) = check_evaluations()
    assert finding.level == "warn"
    assert finding.detail.startswith(f"1 unfinished in {evaluations_folder()}, ")
    result = CliRunner().invoke(main, ["doctor", "--remove-evaluations"])
    assert f"Removed {folders[0]}." in result.stderr
    assert result.stdout.startswith("ok    evaluations")
    assert [folder.exists() for folder in folders] == [False, True]
    running.close()
