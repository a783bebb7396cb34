"""`edmdistill sweep`: a network's metrics over numbers of evaluations and gammas."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edmdistill.cli.eval import SAVE, measure, tasks_of, write_text
from edmdistill.cli.options import (
    BATCH,
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
@click.option("--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]")
@click.option(
    "--nfe",
    "steps",
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
@click.option(
    "--n", "count", type=click.IntRange(2, 2_000_000), help="Images: seeds 0 to N - 1.  [default: the protocol's]"
)
@click.option("--seeds", metavar="LIST", help="Images: these seeds, as in 5000-9999.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document, as eval does.")
@click.option(
    "--out",
    type=OutputPath(".json", *PLOTS),
    metavar="FILE.json",
    help="Also write it here; with the ending of a plot, draw it as --plot does.",
)
@click.option("--save", is_flag=True, help=SAVE)
@click.option(
    "--plot",
    type=OutputPath(*PLOTS),
    metavar="FILE.svg|.html|.png|.pdf",
    help="Draw the first metric over NFE, a curve for each gamma; .png and .pdf take matplotlib.",
)
@click.option("--batch", type=BATCH, default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
def command(
    source: str,
    protocol: str,
    ref: str | None,
    steps: list[int],
    gammas: list[float] | None,
    sampler: SamplerOptions,
    count: int | None,
    seeds: str | None,
    as_json: bool,
    out: Path | None,
    save: bool,
    plot: Path | None,
    batch: int,
    device: str | None,
) -> None:
    """Measure SOURCE, a checkpoint, a run directory or an official pickle, at every number of evaluations and gamma.

    Each is what `eval` measures with that --nfe and --gamma, with the same seeds.
    """
    from edmdistill.atomic import atomic_write
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.results import find_results_folder, results_json
    from edmdistill.evaluation.tables import sweep_table
    from edmdistill.report.page import draw

    if is_images(source):
        raise click.UsageError(f"a sweep draws by a network, and {source} is images: measure them with eval.")
    place = find_results_folder(source) if save else None

    def show(results: "Sequence[Result]") -> None:
        document, table = results_json(results), sweep_table(results)
        for file in filter(None, (out, plot)):
            kind = file.suffix.lower()
            if kind == ".json":
                write_text(file, document)
                continue
            with atomic_write(file) as new:
                draw(table, source, new, kind)
        click.echo(document if as_json else table.to_text())

    own = tasks_of(source, protocol, ref, steps, gammas or [None], sampler, count, seeds, batch, device)
    measure(*own, place, show)
