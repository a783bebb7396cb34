"""`edmdistill compare`: results of several sources in one table."""

from pathlib import Path

import click

from edmdistill.cli.options import plot_option, say, write_text
from edmdistill.cli.types import InputPath, OutputPath


@click.command("compare")
@click.argument("sources", type=InputPath(), nargs=-1, required=True, metavar="FILE.json|RUN...")
@click.option(
    "--over-seeds", is_flag=True, help="One row for runs that differ in training.seed alone: mean ± standard deviation."
)
@click.option("--seeds", metavar="LIST", help="Only results of samples of these seeds, as in 0-4999.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: the whole results.")
@click.option(
    "--out", type=OutputPath(".md", ".csv", ".json"), metavar="FILE.md|.csv|.json", help="Also write it, by the ending."
)
@plot_option
def command(
    sources: tuple[Path, ...],
    over_seeds: bool,
    seeds: str | None,
    as_csv: bool,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Put results side by side in a Markdown table: files that `eval --out` wrote, run directories, checkpoints.

    Numbers that were not measured alike are refused, with what differs: the number of images, seeds, classes,
    reference, weights of the feature network, rounding, decoder. Of images from elsewhere, what is not known is noted.

    An .html of --plot draws all metrics, and of run directories the quality that they measured while training, by
    images seen and device hours, and their newest samples.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other: leave out one of the two.")

    from edmdistill.evaluation import training_seeds
    from edmdistill.evaluation.compare import compare, read_rows

    rows = compare(read_rows(sources, seeds))
    table = training_seeds.over_seeds(rows) if over_seeds else rows
    if plot is not None:
        from edmdistill.atomic import atomic_write
        from edmdistill.report.page import draw_comparison

        with atomic_write(plot) as new:
            note = draw_comparison(table, new, plot.suffix.lower())
        if note:
            say(note)
    texts = {".md": table.to_markdown, ".csv": table.to_csv, ".json": table.to_json}
    if out is not None:
        write_text(out, texts[out.suffix.lower()]().rstrip("\n"))
    kind = ".csv" if as_csv else ".json" if as_json else ".md"
    click.echo(texts[kind]().rstrip("\n"))
