"""What the doctor sees, in machines and packages that are broken for the purpose."""

from pathlib import Path

import pytest

from edmdistill.machine import doctor
from edmdistill.machine.checks import packages
from edmdistill.machine.checks.finding import Finding


def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every check runs here; none may fail but for want of room."""
    monkeypatch.chdir(tmp_path)
    findings = list(doctor.run_checks())
    names = [finding.check for finding in findings]
    assert {"python", "edmdistill", "numpy", "torch", "locks", "forward derivative", "gloo"} <= set(names)
    assert len(names) == len(set(names))
    room = {"memory", "disk", "cache", "hub cache", "shared memory"}
    assert [finding for finding in findings if finding.level == "fail" and finding.check not in room] == []
    for finding in findings:
        assert finding.detail
        assert bool(finding.fix) == (finding.level != "ok")
        assert "\n" not in finding.detail + finding.fix
    assert not list(tmp_path.iterdir())


def test_without_torch_nothing_asks_for_it(package, monkeypatch: pytest.MonkeyPatch):
    package("torch", "2.13.0", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    checks = {name: doctor.CHECKS[name] for name in ("python", "torch")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    *_, last = doctor.run_checks()
    assert last.check == "torch"
    assert last.level == "fail"
    assert last.detail == "cannot be imported: ImportError: libcudart.so.13: cannot open shared object file"


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch):
    def broken():
        yield Finding("a", "ok", "found")
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "python": packages.check_python})
    monkeypatch.setattr(doctor, "TORCH_CHECKS", {})
    findings = list(doctor.run_checks())
    assert [finding.check for finding in findings] == ["a", "broken", "python", "edmdistill"]
    assert findings[1].level == "fail"
    assert findings[1].detail == "could not be checked: ZeroDivisionError: one"
