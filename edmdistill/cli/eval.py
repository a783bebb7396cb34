"""`edmdistill eval`: metrics of a network or of images, bound to a protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edmdistill.cli.sample import SOLVERS

if TYPE_CHECKING:
    from edmdistill.evaluation.protocol import Result

OF_IMAGES = "protocol", "nfe", "gamma", "times", "guidance", "guide", "force_guidance", "solver", "seeds", "save"
OF_LIKELIHOOD = "split", "probes", "tolerance"
"""What only the one kind of measurement takes, and only the other."""
OF_NETWORKS = "nfe", "gamma", "times", "guidance", "guide", "force_guidance", "solver", "count", "seeds"
"""How a network draws: nothing for images that exist."""


def _integers(context: click.Context, option: click.Parameter, text: str | None) -> list[int | None]:
    """Reads 1,2,4."""
    try:
        return [None] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, as 1,2,4 is.") from None


@click.command("eval")
@click.argument("source")
@click.option("--protocol", metavar="NAME", help="How to measure: digits, pixels.")
@click.option("--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]")
@click.option(
    "--metrics", type=click.Choice(["nll"]), help="nll: bits per dimension of --ref, in place of a protocol's metrics."
)
@click.option(
    "--nfe",
    metavar="LIST",
    callback=_integers,
    help="Network evaluations, as in 1,2,4.  [default: generator 2, teacher 35 or 63]",
)
@click.option("--gamma", type=float, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@click.option(
    "--t", "times", metavar="LIST", help="Generator: noise levels as in 80,2.5 or radians as in 1.56rad,1.1rad."
)
@click.option(
    "--guidance", type=float, metavar="W", help="Weight of the guidance, 1 = none.  [default: 1, or the least it knows]"
)
@click.option(
    "--guide", metavar="SOURCE", help="Teacher: network to guide away from.  [default: itself, without classes]"
)
@click.option(
    "--force-guidance", is_flag=True, help="Let a teacher guide itself that was never trained without its classes."
)
@click.option("--solver", type=click.Choice(SOLVERS), help="Teacher, or CTM's generator.  [default: heun]")
@click.option(
    "--n",
    "count",
    type=click.IntRange(min=2),
    help="Images: seeds 0 to N - 1; nll: N of --ref.  [default: the protocol's; nll: all]",
)
@click.option("--seeds", metavar="LIST", help="Images: these seeds, as in 5000-9999.")
@click.option("--split", metavar="NAME", help="nll: train, test or all of the digits.  [default: test]")
@click.option(
    "--probes", type=click.IntRange(min=1), default=4, show_default=True, help="nll: random signs for the divergence."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-5,
    show_default=True,
    help="nll: of the ODE's solver, relative and absolute.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.json", help="Also write it here.")
@click.option("--save", is_flag=True, help="Also keep it in the checkpoint, for its card on the Hub.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
@click.pass_context
def command(
    context: click.Context,
    source: str,
    protocol: str | None,
    ref: str | None,
    metrics: str | None,
    nfe: list[int | None],
    gamma: float | None,
    times: str | None,
    guidance: float | None,
    guide: str | None,
    force_guidance: bool,
    solver: str | None,
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
    _refuse(context, OF_IMAGES if metrics else OF_LIKELIHOOD, "--metrics nll" if metrics else "a measurement of images")
    if not metrics and protocol is None:
        raise click.UsageError("Missing option '--protocol'.")
    if metrics and ref is None:
        raise click.UsageError("--metrics nll measures the likelihood of images: name them by --ref.")
    if count and seeds:
        raise click.UsageError("--n N means the seeds 0 to N - 1, so it does not go with --seeds.")

    from edmdistill.cli.options import say
    from edmdistill.evaluation.images import Images, found, is_images
    from edmdistill.evaluation.saved import checkpoint_to_save_in

    if not metrics and is_images(source):
        _refuse(context, OF_NETWORKS, f"images that exist, as {source} is")
    place = checkpoint_to_save_in(source) if save else None
    if protocol is None:
        result = _likelihood(source, str(ref), split, count, probes, tolerance, batch, device)
        _show([result], as_json, out, place)
        return

    from tqdm import tqdm

    from edmdistill.checkpoints.convert import load_denoiser, load_model
    from edmdistill.evaluation.protocol import evaluate, find_protocol, open_reference
    from edmdistill.sampling.load import pick_device
    from edmdistill.sampling.seeds import parse_seeds
    from edmdistill.sampling.times import parse_times

    numbers = range(count) if count else parse_seeds(seeds) if seeds else None
    standard, where = find_protocol(protocol), pick_device(device)
    data = open_reference(ref, standard)
    model = found(source, data.label_dim) if is_images(source) else load_model(source, where)
    for sentence in (*data.notes, *(model.notes if isinstance(model, Images) else ())):
        say(sentence)
    weaker = None if guide is None else load_denoiser(guide, where)
    levels = total = None
    if not isinstance(model, Images):
        flow, total = model.flow, len(nfe) * (standard.n if numbers is None else len(numbers))
        if times is not None:
            levels = parse_times(times, sigma_data=flow.sigma_data, sigma_min=flow.sigma_min, sigma_max=flow.sigma_max)
    with tqdm(total=total, unit="image", delay=3) as bar:
        results = [
            evaluate(
                model,
                data,
                protocol=protocol,
                nfe=evaluations,
                gamma=gamma,
                times=levels,
                guidance=guidance,
                guide=weaker,
                force_guidance=force_guidance,
                solver=solver,
                seeds=numbers,
                batch=batch,
                device=where,
                source=source,
                on_progress=bar.update,
            )
            for evaluations in nfe
        ]
    _show(results, as_json, out, place)


def _show(results: "Sequence[Result]", as_json: bool, out: Path | None, place: Path | None) -> None:
    """Prints results, and writes them to a file and into a checkpoint if asked."""
    from edmdistill.atomic import atomic_write
    from edmdistill.evaluation.protocol import results_json, results_table
    from edmdistill.evaluation.saved import save_results

    document = results_json(results)
    if out is not None:
        with atomic_write(out) as new:
            new.write_text(document + "\n", encoding="utf-8")
    if place is not None:
        save_results(place, results)
    click.echo(document if as_json else results_table(results))


def _refuse(context: click.Context, names: tuple[str, ...], what: str) -> None:
    """Raises UsageError if an option was given that a measurement does not take."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) == ParameterSource.COMMANDLINE
        if given and parameter.name in names:
            raise click.UsageError(f"{parameter.opts[0]} does not go with {what}: leave it out.")


def _likelihood(
    source: str,
    ref: str,
    split: str | None,
    count: int | None,
    probes: int,
    tolerance: float,
    batch: int,
    device: str | None,
) -> "Result":
    from tqdm import tqdm

    from edmdistill.checkpoints.convert import load_model
    from edmdistill.data.datasets import open_dataset
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.likelihood import evaluate_likelihood
    from edmdistill.sampling.load import pick_device

    if is_images(source):
        raise click.UsageError(f"images have no likelihood of their own, and {source} is images: name a network.")
    data = open_dataset(ref, split=split or ("test" if ref == "digits" else "train"))
    model = load_model(source, pick_device(device))
    with tqdm(total=min(count or len(data), len(data)) * probes, unit="image", delay=3) as bar:
        return evaluate_likelihood(
            model,
            data,
            count=count,
            probes=probes,
            tolerance=tolerance,
            batch=batch,
            source=source,
            on_progress=bar.update,
        )
