"""`edmdistill doctor`."""

import sys

import click

from edmdistill.cli.options import json_option, print_json, say


@click.command("doctor")
@click.option("--remove-evaluations", is_flag=True, help="Remove what stopped evaluations have left in the cache.")
@json_option
def command(remove_evaluations: bool, as_json: bool) -> None:
    """Check versions, devices and this folder's disk, and say how to fix problems.

    Each line says ok, warn or fail, what was found, and the fix. The exit code is 2 if a check failed.
    """
    if remove_evaluations:
        from edmdistill.machine.checks import evaluations

        for folder in evaluations.remove_evaluations():
            say(f"Removed {folder}.")

    from edmdistill.machine.doctor import run_checks

    findings = []
    for finding in run_checks():
        findings.append(finding)
        if not as_json:
            fix = f"; {finding.fix}" if finding.fix else ""
            click.echo(f"{finding.level:<4}  {finding.check:<18}  {finding.detail}{fix}")
    failed = sum(finding.level == "fail" for finding in findings)
    if as_json:
        print_json(failed=failed, checks=[finding._asdict() for finding in findings])
    if failed:
        sys.exit(2)
