"""`edmdistill report`: a run as one HTML page."""

from pathlib import Path

import click

from edmdistill.cli.types import InputPath, OutputPath


@click.command("report")
@click.argument("run", type=InputPath())
@click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE.json",
    help="Results written by `eval --out`; may be repeated.  [default: all in RUN/eval and in its checkpoint]",
)
@click.option(
    "--out",
    type=OutputPath(".html", ".htm"),
    metavar="FILE.html",
    help="File to write.  [default: RUN/report.html]",
)
def command(run: Path, results: tuple[Path, ...], out: Path | None) -> None:
    """Write the report of the run directory RUN: teacher and generator by number of steps, samples, curves, recipe.

    The page is one file that needs no network. The tables are printed too.
    """
    from edmdistill.atomic import atomic_write, unwritable
    from edmdistill.errors import EdmDistillError
    from edmdistill.evaluation.results import load_results, read_results
    from edmdistill.evaluation.tables import result_tables, sweep_tables
    from edmdistill.report.page import report
    from edmdistill.report.summary import read_run

    summary = read_run(run)
    if out is None and unwritable(run / "report.html"):
        raise EdmDistillError(f"this user may not write in {run}: add --out FILE.html")
    out = out or run / "report.html"
    saved = read_results(results) if results else load_results(run)
    measured = result_tables(saved, summary.generator)
    swept = sweep_tables(saved, summary.generator)
    with atomic_write(out) as new:
        new.write_text(report(summary, measured, swept), encoding="utf-8")
    for table in [*measured, *swept]:
        click.echo(f"{table.to_text()}\n")
    click.echo(f"{out} is written.")
