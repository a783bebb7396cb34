"""`edmdistill data inspect`."""

import click

from edmdistill.cli.options import json_option, split_option


@click.command("inspect")
@click.argument("source", metavar="SET")
@split_option
@click.option("--teacher", metavar="TEACHER", help="Compare classes, shape and statistics with what this one takes.")
@json_option
def command(source: str, split: str, teacher: str | None, as_json: bool) -> None:
    """Show the contents of a data set, and which files are left out.

    SET is a zip, a folder, or the word digits or tiles. Every image is read, so broken ones are found. The
    statistics of latents are compared with those that the teacher, or else the set, declares.
    """
    from edmdistill.data.inspect import inspect_data, to_json, to_text
    from edmdistill.progress import progress_bar

    with progress_bar(unit="image") as bar:
        contents = inspect_data(source, split=split, teacher=teacher, on_progress=bar.update)
    click.echo(to_json(contents) if as_json else to_text(contents))
