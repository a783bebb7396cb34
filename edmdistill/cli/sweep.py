"""`edmdistill sweep`: a network's metrics over numbers of evaluations and gammas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edmdistill.cli.measurements import (
    MeasurementOptions,
    measure,
    measurement_options,
    plan_measurements,
    write_text,
)
from edmdistill.cli.options import (
    GAMMA,
    NFE,
    PROTOCOLS,
    Name,
    NumberList,
    OutputPath,
    SamplerOptions,
    sampler_options,
)

if TYPE_CHECKING:
    from edmdistill.evaluation.results import Result

PLOTS = ".svg", ".html", ".png", ".pdf"


@click.command("sweep")
@click.argument("source")
@click.option("--protocol", type=Name(PROTOCOLS), required=True, help="How to measure.")
@click.option(
    "--nfe",
    "nfes",
    required=True,
    metavar="LIST",
    type=NumberList(NFE, "1,2,4"),
    help="Network evaluations, as in 1,2,4,8.",
)
@click.option(
    "--gamma",
    "gammas",
    metavar="LIST",
    type=NumberList(GAMMA, "0,.5,1"),
    help="Generator: shares of fresh noise, as in 0,.5,1.  [default: the checkpoint's]",
)
@sampler_options
@measurement_options("Images: seeds 0 to N - 1.  [default: the protocol's]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document, as eval does.")
@click.option(
    "--out",
    type=OutputPath(".json", *PLOTS),
    metavar="FILE.json",
    help="Also write it here; with the ending of a plot, draw it as --plot does.",
)
@click.option(
    "--plot",
    type=OutputPath(*PLOTS),
    metavar="FILE.svg|.html|.png|.pdf",
    help="Draw the first metric over NFE, a curve for each gamma; .png and .pdf take matplotlib.",
)
def command(
    source: str,
    protocol: str,
    nfes: list[int],
    gammas: list[float] | None,
    sampler: SamplerOptions,
    options: MeasurementOptions,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Measure SOURCE, a checkpoint, a run directory or an official pickle, at every number of evaluations and gamma.

    Each value equals that of `eval` with that --nfe and --gamma: the seeds are the same.
    """
    from edmdistill.atomic import atomic_write
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.results import find_results_folder, results_json
    from edmdistill.evaluation.tables import sweep_table
    from edmdistill.report.page import draw

    if is_images(source):
        raise click.UsageError(f"a sweep samples a network, and {source} is images: measure them with eval.")
    folder = find_results_folder(source) if options.save else None

    def show(results: Sequence[Result]) -> None:
        document, table = results_json(results), sweep_table(results)
        for file in filter(None, (out, plot)):
            kind = file.suffix.lower()
            if kind == ".json":
                write_text(file, document)
                continue
            with atomic_write(file) as new:
                draw(table, source, new, kind)
        click.echo(document if as_json else table.to_text())

    measure(plan_measurements(source, protocol, options, sampler, nfes, gammas or [None]), folder, show)
