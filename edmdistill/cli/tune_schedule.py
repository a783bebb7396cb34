"""`edmdistill tune-schedule`: noise levels chosen by a metric."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from edmdistill.cli.measurements import MeasurementOptions, measurement_options, plan_measurements, shared
from edmdistill.cli.options import interruptible, json_option, option_group, say
from edmdistill.cli.types import PROTOCOLS, Count, Name, NumberList

if TYPE_CHECKING:
    from edmdistill.sampling.tune import TuningPlan

MAX_NFE = 64
"""Every level is scaled by itself: more would take too many measurements."""


def _plan(**values: object) -> TuningPlan:
    from edmdistill.sampling.tune import TuningPlan

    return TuningPlan(**values)  # type: ignore[arg-type]  # click has checked them


plan_options = option_group(
    "plan",
    _plan,
    click.option(
        "--family",
        type=click.Choice(["levels", "curve", "both"]),
        default="both",
        show_default=True,
        help="levels: scale them one by one, as CoSIM does; curve: scale and bend EDM's curve; both: the curve first.",
    ),
    click.option("--n", type=Count(2, 1_000_000), default=5000, show_default=True, help="Images of a measurement."),
    click.option(
        "--sets", type=Count(2, 100), default=3, show_default=True, help="Sets of held-out seeds, --n each, to confirm."
    ),
    click.option(
        "--budget", "images", type=Count(1), metavar="IMAGES", help="Images to draw at most for each of --nfe."
    ),
)


@click.command("tune-schedule")
@click.argument("source", metavar="GENERATOR")
@click.option(
    "--nfe",
    "nfes",
    type=NumberList(Count(2, MAX_NFE), "2,4"),
    required=True,
    metavar="LIST",
    help="As in 2,4.",
)
@click.option("--metric", metavar="NAME", help="As in fid or fd_digits.  [default: the protocol's first]")
@click.option("--protocol", type=Name(PROTOCOLS), help="How to measure.  [default: the first with that metric]")
@plan_options
@measurement_options(raw=False, metrics=None, count=None, seeds=None, repeat=1, save=False)
@click.option("--dry-run", is_flag=True, help="Measure, and leave the checkpoint as it is.")
@json_option
def command(
    source: str,
    nfes: list[int],
    metric: str | None,
    protocol: str | None,
    plan: TuningPlan,
    options: MeasurementOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Search for better noise levels of GENERATOR, a checkpoint or a run directory, by a metric.

    All schedules are measured with the same seeds, which no protocol uses. The best one is stored in the checkpoint,
    with its numbers, if it also beats the one in use on held-out seeds, by more than the spread; sample and eval use it
    from then on. After Ctrl-C or a kill, the same command goes on.
    """
    if "raw" in options.weights:
        raise click.UsageError("a schedule is stored with a run's averaged weights: leave out --weights raw.")

    from edmdistill.evaluation import tune
    from edmdistill.sampling.spec import SamplerSpec

    folder = tune.find_generator(source, stored=not dry_run)
    metric, protocol = tune.find_measure(metric, protocol)
    with shared(options) as processes:
        options = replace(options, metrics=[metric])
        measurements = plan_measurements(source, protocol, options, lambda *_: [SamplerSpec()], processes)
        ((_, evaluate),), work = measurements.tasks, measurements.work
        assert work is not None
        kept = f"nothing is stored yet; the same command goes on with what is kept in {work.root}."
        with closing(work), interruptible(lambda: kept):
            tunings = tune.tune_schedules(evaluate, folder, nfes, plan, processes)
            if processes.rank:
                return
            stored = not dry_run and tune.store_tunings(folder, tunings)
            work.remove()
    if stored:
        say(f"{folder} is changed: sample and eval use the new levels.")
    if as_json:
        click.echo(tune.tuning_json(source, tunings))
        return
    for nfe, tuning in tunings.items():
        click.echo(tune.describe_tuning(nfe, tuning))
