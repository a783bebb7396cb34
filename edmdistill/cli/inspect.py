"""edmdistill inspect."""

import click


@click.command("inspect")
@click.argument("source", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--tensors", is_flag=True, help="List every tensor, its dtype and its shape.")
def command(source: str, as_json: bool, tensors: bool) -> None:
    """Show what is in FILE, without running it.

    FILE is an official EDM or EDM2 pickle, or a checkpoint folder of ours; a URL or a Hub id is downloaded first.
    """
    from edmdistill.checkpoints.inspect import inspect, to_json, to_text
    from edmdistill.checkpoints.source import resolve

    summary = inspect(resolve(source))
    if not tensors:
        del summary["tensors"]
    click.echo(to_json(summary) if as_json else to_text(summary))
