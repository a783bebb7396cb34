"""`edmdistill data`: commands for data sets, each in its own file, imported when called."""

import importlib

import click

COMMANDS = ("encode", "inspect", "prepare", "stats")


class DataGroup(click.Group):
    """A group whose command NAME is the object `command` of edmdistill.cli.data_NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"edmdistill.cli.data_{name}").command
        assert isinstance(command, click.Command)
        return command


@click.group("data", cls=DataGroup)
def command() -> None:
    """Prepare, encode and inspect data sets: zips and folders of images or latents, in EDM's layout."""
