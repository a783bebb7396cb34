"""`edmdistill inspect`."""

import click

from edmdistill.cli.options import json_option
from edmdistill.errors import counted


@click.command("inspect")
@click.argument("source", metavar="FILE")
@json_option
@click.option("--tensors", is_flag=True, help="List every tensor, its dtype and its shape.")
@click.option("--classes", is_flag=True, help="Print only the classes, with number and name.")
@click.option("--check", is_flag=True, help="Load the network, and test whether it is a denoiser or a generator.")
def command(source: str, as_json: bool, tensors: bool, classes: bool, check: bool) -> None:
    """Show the contents of FILE, without running it.

    FILE is an official EDM or EDM2 pickle, OpenAI's .pt, a checkpoint folder, or a run, whose generator is shown; a URL
    or a Hub id is downloaded first.
    """
    if classes and (as_json or tensors or check):
        raise click.UsageError("--classes prints only the classes: leave out --json, --tensors and --check.")

    from edmdistill.checkpoints.inspect import inspect, to_json, to_text
    from edmdistill.checkpoints.source import open_source
    from edmdistill.errors import CheckpointError, printable

    checkpoint = open_source(source)
    summary = inspect(checkpoint)
    if classes:
        names = summary.get("label_names")
        if not isinstance(names, list) or not names:
            dim = summary.get("label_dim")
            known = "has no classes"
            if isinstance(dim, int) and dim:
                known = f"has no names for its {counted(dim, 'class')}: choose by number"
            raise CheckpointError(f"{checkpoint.path} {known}")
        click.echo("\n".join(f"{number:>4} {printable(str(name))}" for number, name in enumerate(names)))
        return
    if check:
        from edmdistill.checkpoints.load import load_flow
        from edmdistill.checkpoints.noise_dependence import describe_dependence, noise_dependence

        value = noise_dependence(load_flow(checkpoint)[0])
        measured = {"noise_dependence": value, "function": describe_dependence(value)}
        summary = measured | summary | measured  # first in order, and not those of config.json
    if not tensors:
        del summary["tensors"]
    click.echo(to_json(summary) if as_json else to_text(summary))
