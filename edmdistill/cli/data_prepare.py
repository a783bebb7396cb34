"""`edmdistill data prepare`."""

import re
from pathlib import Path
from typing import Any

import click

from edmdistill.cli.options import interruptible, say
from edmdistill.cli.types import Count, InputPath, Name, OutputPath

TRANSFORMS = "none", "center-crop", "center-crop-wide", "center-crop-dhariwal"
LABELS = "auto", "folders", "none"
SPLITS = "train", "test", "validation"
"""The keys of the library's tables, which are not imported for `--help`; a test compares them."""


class Resolution(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """A number of pixels, or WIDTHxHEIGHT."""

    name = "resolution"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        sizes = re.fullmatch(r"([1-9][0-9]{0,8})(?:[x,]([1-9][0-9]{0,8}))?", str(value))
        if sizes is None:
            self.fail(f"{value!r} is no size; give a number such as 64, or WIDTHxHEIGHT.", param, ctx)
        return int(sizes[1]), int(sizes[2] or sizes[1])


@click.command("prepare")
@click.argument("source", type=InputPath())
@click.argument("out", metavar="OUT.zip", type=OutputPath(".zip"))
@click.option("--resolution", type=Resolution(), metavar="N", help="Height and width.  [default: as the pictures are]")
@click.option(
    "--transform", type=Name(TRANSFORMS), default="none", show_default=True, help="Crop, as dataset_tool.py's."
)
@click.option("--max-images", type=Count(1), metavar="N", help="Read only the first N pictures.")
@click.option(
    "--labels",
    type=Name(LABELS),
    default="auto",
    show_default=True,
    help="Where classes come from; auto: dataset.json, or else the top folders.",
)
@click.option("--split", type=Name(SPLITS), default="train", show_default=True, help="Of CIFAR-10 and parquet files.")
@click.option("--workers", type=Count(1, 256), metavar="N", help="Threads.  [default: one a core]")
@click.option("--overwrite", is_flag=True, help="Replace OUT.zip, or one that was begun with other options.")
def command(source: Path, out: Path, workers: int | None, **options: Any) -> None:
    """Make a data set of pictures, the same as EDM2's dataset_tool.py makes.

    SOURCE is a folder, zip or tar of pictures, ImageNet's tar, CIFAR-10's archive, MNIST's train-images-idx3-ubyte.gz,
    or a Hub data set's parquet files. After an interruption, the same command goes on where it stopped.
    """
    from edmdistill.data.prepare import prepare_data, to_text
    from edmdistill.machine.host import cores
    from edmdistill.progress import progress_bar

    size = source.stat().st_size if source.is_file() else None
    with (
        interruptible(lambda: "the same command goes on from here."),
        progress_bar(size, "reading the archive", unit="B", unit_scale=True, leave=False) as archive,
        progress_bar(unit="image") as bar,
    ):

        def show(done: int, total: int) -> None:
            archive.close()
            if bar.total is None:  # what was done before does not count in the rate
                bar.total, bar.initial = total, done
                bar.unpause()
            bar.update(done - bar.n)

        summary = prepare_data(
            source, out, workers=workers or cores(), on_progress=show, on_bytes=archive.update, **options
        )
    for note in summary.notes:
        say(note)
    click.echo(to_text(summary))
