"""What eval and sweep share: their options, and how their results are saved and printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edmdistill.cli.options import BATCH, SamplerOptions, option_group, say, say_unfinished

if TYPE_CHECKING:
    from edmdistill.evaluation.measurements import Measurements
    from edmdistill.evaluation.results import Result


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of a measurement, as they were typed."""

    ref: str | None
    count: int | None
    seeds: str | None
    save: bool
    batch: int
    device: str | None


def measurement_options(count_help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds the options of a measurement; the command gets them as one `options`.

    Args:
        count_help: of --n.
    """
    return option_group(
        "options",
        MeasurementOptions,
        click.option(
            "--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]"
        ),
        click.option("--n", "count", type=click.IntRange(2, 2_000_000), help=count_help),
        click.option("--seeds", metavar="LIST", help="Images: these seeds, as in 5000-9999."),
        click.option(
            "--save",
            is_flag=True,
            help="Also save it with the checkpoint or run, where report and push-to-hub find it.",
        ),
        click.option("--batch", type=BATCH, default=256, show_default=True, help="Images at a time."),
        click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]"),
    )


def plan_measurements(
    source: str,
    protocol: str,
    options: MeasurementOptions,
    sampler: SamplerOptions,
    nfes: Sequence[int | None],
    gammas: Sequence[float | None],
) -> Measurements:
    """Loads a source and its reference, and returns the measurements of it."""
    if options.count and options.seeds:
        raise click.UsageError("--n N means the seeds 0 to N - 1, so it cannot be combined with --seeds.")

    from edmdistill.checkpoints.load import load_model
    from edmdistill.checkpoints.source import open_source
    from edmdistill.evaluation.images import is_images, open_images
    from edmdistill.evaluation.measurements import measure_images, measure_network
    from edmdistill.evaluation.protocol import get_protocol, open_reference
    from edmdistill.machine.devices import pick_device
    from edmdistill.sampling.seeds import parse_seeds
    from edmdistill.sampling.spec import SamplerSpec

    seeds = range(options.count) if options.count else parse_seeds(options.seeds) if options.seeds else None
    standard, device = get_protocol(protocol), pick_device(options.device)
    data = open_reference(options.ref, standard)
    for sentence in data.notes:
        say(sentence)
    if is_images(source):
        images = open_images(source, data.label_dim)
        for sentence in images.notes:
            say(sentence)
        return measure_images(images, data, standard, source, batch=options.batch, device=device)
    checkpoint = open_source(source)
    model = load_model(checkpoint, device, weights=sampler.weights)
    say_unfinished(checkpoint)
    fields = sampler.arguments(model.flow, device)
    samplers = [SamplerSpec(nfe=nfe, gamma=gamma, **fields) for gamma in gammas for nfe in nfes]
    return measure_network(
        model, data, standard, samplers=samplers, seeds=seeds, batch=options.batch, device=device, source=source
    )


def measure(measurements: Measurements, folder: Path | None, show: Callable[[Sequence[Result]], None]) -> None:
    """Makes measurements with a progress bar, and shows the results that there are, also after Ctrl-C.

    Args:
        folder: where results are saved, or None.
        show: prints and writes them.
    Raises: NotFiniteError: a measurement has no finite result; the others are shown.
    """
    from edmdistill.errors import NotFiniteError
    from edmdistill.evaluation.measurements import run_measurements
    from edmdistill.progress import progress_bar

    with progress_bar(measurements.images) as bar:
        results, failures, interrupted = run_measurements(measurements, folder, bar.update)
    if results:
        show(results)
    if interrupted:
        saved = " and saved" if folder is not None else ""
        count = f"{len(results)} of {len(measurements.tasks)} measurements are done{saved}"
        click.echo(
            f"Interrupted: {count if results else 'nothing is measured yet'}; the measurement in progress is lost.",
            err=True,
        )
        sys.exit(130)
    if failures:
        raise NotFiniteError("; ".join(failures))


def write_text(file: Path, text: str) -> None:
    """Writes a document as a file, whole or not at all."""
    from edmdistill.atomic import atomic_write

    with atomic_write(file) as new:
        new.write_text(text + "\n", encoding="utf-8")
