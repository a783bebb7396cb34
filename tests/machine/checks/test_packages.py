"""Packages that are old, absent, or broken for the purpose."""

from importlib.metadata import version

import pytest
from machine_findings import only_finding

from edmdistill.machine.checks import packages
from edmdistill.machine.checks.finding import Finding


def test_requirements(package):
    package("old", "1.9.0+local")
    package("late", "3.0")
    package("pre", "2.1.dev0")
    requires = ("old>=2.6", "late<3,>=1", "pre>=2.0", "absent-for-a-test>=1.5", "dev-only; extra == 'dev'")
    package("edmdistill", "0.0", requires=requires)
    found = {finding.check: finding for finding in packages.check_requirements()}
    assert {name: finding.level for name, finding in found.items()} == {
        "old": "fail",
        "late": "fail",
        "pre": "ok",
        "absent-for-a-test": "fail",
    }
    assert found["old"].detail == "1.9.0+local, but >=2.6 is needed"
    assert found["absent-for-a-test"].fix == "pip install 'absent-for-a-test>=1.5'"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_package_that_does_not_fit_torch(package, name: str, code: str, reason: str):
    package(name, "0.1", code)
    found = {finding.check: finding for finding in packages.check_image_packages()}
    assert found[name].level == "fail"
    assert f"0.1 does not match torch {version('torch')}" in found[name].detail
    assert reason in found[name].detail
    assert f"pip uninstall {name}" in found[name].fix


def test_a_package_that_fits(package):
    package("timm", "1.0")
    assert Finding("timm", "ok", "1.0") in packages.check_image_packages()


@pytest.mark.parametrize(("name", "level"), [("dnnlib", "warn"), ("torch_utils", "warn"), ("torchinfo", "ok")])
def test_namesakes(package, name: str, level: str):
    package(name, "0.1")
    finding = only_finding(packages.check_namesakes)
    assert finding.level == level
    assert (name in finding.detail) == (level == "warn")
