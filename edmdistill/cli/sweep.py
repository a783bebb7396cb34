"""`edmdistill sweep`: a network's metrics over numbers of evaluations and gammas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edmdistill.cli.measurements import MeasurementOptions, measure, measurement_options, plan_measurements, shared
from edmdistill.cli.options import PLOTS, list_option, plot_option, write_text
from edmdistill.cli.sampling_options import SamplerGrid, sampler_grid_options
from edmdistill.cli.types import GAMMA, NFE, PROTOCOLS, Name, OutputPath

if TYPE_CHECKING:
    from edmdistill.checkpoints.load import Dtype
    from edmdistill.evaluation.results import Result
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.sampling.spec import SamplerSpec


@click.command("sweep")
@click.argument("source")
@click.option("--protocol", type=Name(PROTOCOLS), required=True, help="How to measure.")
@list_option("--nfe", "nfes", NFE, "1,2,4", "Network evaluations; with --t they follow from its levels.")
@list_option("--gamma", "gammas", GAMMA, "0,.5,1", "Generator: shares of fresh noise.  [default: the checkpoint's]")
@sampler_grid_options
@measurement_options("Seeds 0 to N - 1.  [default: the protocol's]", "As in fid,fd_dinov2.  [default: the protocol's]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document, as eval does.")
@click.option(
    "--out",
    type=OutputPath(".json", *PLOTS),
    metavar="FILE.json",
    help="Also write it here; with the ending of a plot, draw it as --plot does.",
)
@plot_option
def command(
    source: str,
    protocol: str,
    nfes: list[int] | None,
    gammas: list[float] | None,
    sampler: SamplerGrid,
    options: MeasurementOptions,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Measure SOURCE, a checkpoint, a run directory or an official pickle, at each combination of --nfe or --t,
    --gamma, --solver and --guidance.

    Each value equals that of `eval` with these options: the seeds are the same. After Ctrl-C or a kill, the same
    command goes on.
    """
    if not nfes and not sampler.times:
        raise click.UsageError("A sweep is over numbers of evaluations or schedules: give --nfe or --t.")

    from edmdistill.atomic import atomic_write
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.results import results_json
    from edmdistill.evaluation.tables import sweep_table
    from edmdistill.report.page import draw

    if is_images(source):
        raise click.UsageError(f"a sweep samples a network, and {source} is images: measure them with eval.")
    folder = options.results_folder(source)

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

    def specs(flow: FlowNetwork, dtype: Dtype) -> list[SamplerSpec]:
        return sampler.specs(flow, dtype, nfes or [None], gammas or [None])

    with shared(options) as processes:
        measure(plan_measurements(source, protocol, options, specs, processes), folder, show)
