"""Calls of the command line in this process."""

from click.testing import CliRunner, Result

from edmdistill.cli import main


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])
