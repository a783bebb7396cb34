"""`edmdistill data`: commands for data sets, each in its own file, imported when called."""

import click

from edmdistill.cli import LazyGroup

COMMANDS = {
    "prepare": "Turn pictures into a data set in EDM's layout.",
    "encode": "Encode images by a VAE: a data set of latents.",
    "stats": "Measure the statistics of images that evaluations compare with.",
    "inspect": "Show what a data set holds: images, files left out, classes, mean and standard deviation.",
}


@click.group("data", cls=LazyGroup, summaries=COMMANDS, prefix="data_")
def command() -> None:
    """Prepare, encode, measure and inspect data sets: zips and folders of images or latents, in EDM's layout."""
