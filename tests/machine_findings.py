"""Findings of one check of the machine."""

from edmdistill.machine.checks.finding import Check, Finding


def only_finding(check: Check) -> Finding:
    """Returns the finding of a check that has one."""
    (finding,) = check()
    return finding
