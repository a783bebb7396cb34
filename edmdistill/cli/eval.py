"""`edmdistill eval`: metrics of a network or of images, bound to a protocol."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edmdistill.cli.options import (
    BATCH,
    GAMMA,
    NFE,
    PROTOCOLS,
    FiniteFloat,
    Name,
    NumberList,
    OutputPath,
    SamplerOptions,
    sampler_options,
    say,
    say_unfinished,
)

if TYPE_CHECKING:
    from edmdistill.evaluation.results import Result

OF_NETWORKS = "nfe", "gamma", "times", "guidance", "guide", "force_guidance", "solver", "weights", "count", "seeds"
OF_IMAGES = (
    "protocol",
    "nfe",
    "gamma",
    "times",
    "guidance",
    "guide",
    "force_guidance",
    "solver",
    "weights",
    "seeds",
    "save",
)
OF_LIKELIHOOD = "split", "probes", "tolerance"
"""What only a network takes; what only the one kind of measurement takes, and only the other."""
SAVE = "Also keep it with the checkpoint or run, where report and push-to-hub find it."


@click.command("eval")
@click.argument("source")
@click.option("--protocol", type=Name(PROTOCOLS), help="How to measure.")
@click.option("--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]")
@click.option(
    "--metrics", type=click.Choice(["nll"]), help="nll: bits per dimension of --ref, in place of a protocol's metrics."
)
@click.option(
    "--nfe",
    metavar="LIST",
    type=NumberList(NFE, "1,2,4"),
    help="Network evaluations, as in 1,2,4.  [default: generator 2, teacher 35 or 63]",
)
@click.option("--gamma", type=GAMMA, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@sampler_options
@click.option(
    "--n",
    "count",
    type=click.IntRange(2, 2_000_000),
    help="Images: seeds 0 to N - 1; nll: N of --ref.  [default: the protocol's; nll: all]",
)
@click.option("--seeds", metavar="LIST", help="Images: these seeds, as in 5000-9999.")
@click.option("--split", metavar="NAME", help="nll: train, test or all of the digits.  [default: test]")
@click.option(
    "--probes",
    type=click.IntRange(1, 10_000),
    default=4,
    show_default=True,
    help="nll: random signs for the divergence.",
)
@click.option(
    "--tolerance",
    type=FiniteFloat(0, 1, min_open=True),
    default=1e-5,
    show_default=True,
    help="nll: of the ODE's solver, relative and absolute.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--out", type=OutputPath(".json"), metavar="FILE.json", help="Also write it here.")
@click.option("--save", is_flag=True, help=SAVE)
@click.option("--batch", type=BATCH, default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
@click.pass_context
def command(
    context: click.Context,
    source: str,
    protocol: str | None,
    ref: str | None,
    metrics: str | None,
    nfe: list[int] | None,
    gamma: float | None,
    sampler: SamplerOptions,
    count: int | None,
    seeds: str | None,
    split: str | None,
    probes: int,
    tolerance: float,
    as_json: bool,
    out: Path | None,
    save: bool,
    batch: int,
    device: str | None,
) -> None:
    """Measure SOURCE against real images: a checkpoint, a run directory, an official pickle, or images in a folder, zip
    or .npz.

    A network is sampled once for each of --nfe, image i with seed i and class i modulo the number of classes. With
    --metrics nll nothing is drawn: the likelihood of --ref under the network is measured, in bits per dimension.
    """
    other = "--metrics nll" if metrics else "a measurement of images"
    _refuse(context, OF_IMAGES if metrics else OF_LIKELIHOOD, f"does not go with {other}")
    if not metrics and protocol is None:
        raise click.UsageError(f"Missing option '--protocol'. Choose one of {', '.join(PROTOCOLS)}.")
    if metrics and ref is None:
        raise click.UsageError("--metrics nll measures the likelihood of images: name them by --ref.")

    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.results import find_results_folder, results_json, results_table
    from edmdistill.sampling.files import unfinished_samples

    if is_images(source) and not metrics:
        _refuse(context, OF_NETWORKS, f"says how a network draws, but {source} holds images, which exist")
        if sentence := unfinished_samples(Path(source)):
            say(sentence)
    place = find_results_folder(source) if save else None
    total, tasks = (
        _likelihood(source, str(ref), split, count, probes, tolerance, batch, device)
        if protocol is None
        else tasks_of(source, protocol, ref, nfe or [None], [gamma], sampler, count, seeds, batch, device)
    )

    def show(results: "Sequence[Result]") -> None:
        document = results_json(results)
        if out is not None:
            write_text(out, document)
        click.echo(document if as_json else results_table(results))

    measure(total, tasks, place, show)


def tasks_of(
    source: str,
    protocol: str,
    ref: str | None,
    steps: Sequence[int | None],
    gammas: Sequence[float | None],
    sampler: SamplerOptions,
    count: int | None,
    seeds: str | None,
    batch: int,
    device: str | None,
) -> "tuple[int | None, dict[str, Callable[..., Result]]]":
    """How many images are drawn in all, and the measurements by their names, each to be called with on_progress."""
    if count and seeds:
        raise click.UsageError("--n N means the seeds 0 to N - 1, so it does not go with --seeds.")

    from functools import partial

    from edmdistill.checkpoints.load import load_model
    from edmdistill.checkpoints.source import open_source
    from edmdistill.evaluation.evaluate import evaluate
    from edmdistill.evaluation.images import is_images, open_images
    from edmdistill.evaluation.protocol import get_protocol, open_reference
    from edmdistill.machine.devices import pick_device
    from edmdistill.sampling.seeds import parse_seeds

    numbers = range(count) if count else parse_seeds(seeds) if seeds else None
    standard, where = get_protocol(protocol), pick_device(device)
    data = open_reference(ref, standard)
    own = partial(evaluate, protocol=protocol, seeds=numbers, batch=batch, device=where, source=source)
    for sentence in data.notes:
        say(sentence)
    if is_images(source):
        images = open_images(source, data.label_dim)
        for sentence in images.notes:
            say(sentence)
        return images.count, {source: partial(own, images, data)}
    checkpoint = open_source(source)
    model = load_model(checkpoint, where, weights=sampler.weights)
    say_unfinished(checkpoint)
    drawn = partial(own, model, data, **sampler.arguments(model.flow, where))
    tasks: dict[str, Callable[..., Result]] = {}
    for gamma in gammas:
        for nfe in steps:
            words = [f"{nfe or 'default'} NFE"] + ([] if gamma is None else [f"gamma {gamma:g}"])
            tasks[", ".join(words)] = partial(drawn, nfe=nfe, gamma=gamma)
    return len(tasks) * (standard.n if numbers is None else len(numbers)), tasks


def measure(
    total: int | None,
    tasks: "Mapping[str, Callable[..., Result]]",
    place: Path | None,
    show: "Callable[[Sequence[Result]], None]",
) -> None:
    """Measures one after another, keeps each at once if asked, and shows what there is, also after Ctrl-C.

    Args:
        total: images that are drawn in all.
        place: where results are kept, or None.
        show: prints and writes them.
    Raises: NotFiniteError: a measurement has no finite result; the others are shown.
    """
    from edmdistill.errors import NotFiniteError
    from edmdistill.evaluation.results import save_results
    from edmdistill.progress import progress_bar

    results: list[Result] = []
    failures: list[str] = []
    interrupted = False
    try:
        with progress_bar(total) as bar:
            for name, task in tasks.items():
                try:
                    result = task(on_progress=bar.update)
                except NotFiniteError as error:
                    failures.append(f"{name}: {error}")
                    continue
                if place is not None:
                    save_results(place, [result])
                results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    if results:
        show(results)
    if interrupted:
        kept = " and saved" if place is not None else ""
        done = f"{len(results)} of {len(tasks)} measurements are done{kept}" if results else "nothing is measured yet"
        click.echo(f"Interrupted: {done}; what was under way is lost.", err=True)
        sys.exit(130)
    if failures:
        raise NotFiniteError("; ".join(failures))


def write_text(file: Path, text: str) -> None:
    """Writes a document as a file, whole or not at all."""
    from edmdistill.atomic import atomic_write

    with atomic_write(file) as new:
        new.write_text(text + "\n", encoding="utf-8")


def _refuse(context: click.Context, names: tuple[str, ...], why: str) -> None:
    """Raises UsageError if an option was given that a measurement does not take."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) == ParameterSource.COMMANDLINE
        if given and parameter.name in names:
            raise click.UsageError(f"{parameter.opts[0]} {why}: leave it out.")


def _likelihood(
    source: str,
    ref: str,
    split: str | None,
    count: int | None,
    probes: int,
    tolerance: float,
    batch: int,
    device: str | None,
) -> "tuple[int, dict[str, Callable[..., Result]]]":
    from functools import partial

    from edmdistill.checkpoints.load import load_model
    from edmdistill.checkpoints.source import open_source
    from edmdistill.data.datasets import open_dataset
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.likelihood import evaluate_likelihood
    from edmdistill.machine.devices import pick_device

    if is_images(source):
        raise click.UsageError(f"images have no likelihood of their own, and {source} is images: name a network.")
    data = open_dataset(ref, split=split or ("test" if ref == "digits" else "train"))
    own: dict[str, Any] = {"count": count, "probes": probes, "tolerance": tolerance, "batch": batch, "source": source}
    checkpoint = open_source(source)
    model = load_model(checkpoint, pick_device(device))
    say_unfinished(checkpoint)
    return min(count or len(data), len(data)) * probes, {"nll": partial(evaluate_likelihood, model, data, **own)}
