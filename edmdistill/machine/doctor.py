"""Checks of the machine and the installation, each with a line of result and a fix."""

from __future__ import annotations

from collections.abc import Iterator

from edmdistill.machine.checks import devices, evaluations, packages, resources
from edmdistill.machine.checks.finding import Check, Finding, first_line

CHECKS: dict[str, Check] = {
    "python": packages.check_python,
    "requirements": packages.check_requirements,
    "torch": packages.check_torch,
    "namesakes": packages.check_namesakes,
    "memory": resources.check_memory,
    "disk": resources.check_disk,
    "temporary files": resources.check_temporary_files,
    "locks": resources.check_locks,
    "shared memory": resources.check_shared_memory,
}
TORCH_CHECKS: dict[str, Check] = {
    "threads": resources.check_threads,
    "image packages": packages.check_image_packages,
    "devices": devices.check_devices,
    "forward derivative": devices.check_tangents,
    "distributed": devices.check_distributed,
    "evaluations": evaluations.check_evaluations,
}


def run_checks() -> Iterator[Finding]:
    """Yields the findings of all checks, in the order of CHECKS; TORCH_CHECKS are skipped if torch is broken."""
    sound = True
    for name, check in {**CHECKS, **TORCH_CHECKS}.items():
        if name in TORCH_CHECKS and not sound:
            continue
        try:
            for finding in check():
                sound = sound and (finding.check, finding.level) != ("torch", "fail")
                yield finding
        except Exception as error:  # one broken check must not hide the others
            detail = f"could not be checked: {type(error).__name__}: {first_line(error)}"
            yield Finding(name, "fail", detail, "report this, unless the lines above explain it")
