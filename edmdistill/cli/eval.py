"""`edmdistill eval`: metrics of a network or of images, bound to a protocol."""

from pathlib import Path

import click

from edmdistill.cli.sample import SOLVERS


def _integers(context: click.Context, option: click.Parameter, text: str | None) -> list[int | None]:
    """Reads 1,2,4."""
    try:
        return [None] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, as 1,2,4 is.") from None


@click.command("eval")
@click.argument("source")
@click.option("--protocol", required=True, metavar="NAME", help="How to measure: digits, pixels.")
@click.option("--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]")
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
@click.option("--solver", type=click.Choice(SOLVERS), help="Teacher.  [default: heun]")
@click.option("--n", "count", type=click.IntRange(min=2), help="Images: seeds 0 to N - 1.  [default: the protocol's]")
@click.option("--seeds", metavar="LIST", help="Images: these seeds, as in 5000-9999.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.json", help="Also write it here.")
@click.option("--save", is_flag=True, help="Also keep it in the checkpoint, for its card on the Hub.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
def command(
    source: str,
    protocol: str,
    ref: str | None,
    nfe: list[int | None],
    gamma: float | None,
    times: str | None,
    guidance: float | None,
    guide: str | None,
    solver: str | None,
    count: int | None,
    seeds: str | None,
    as_json: bool,
    out: Path | None,
    save: bool,
    batch: int,
    device: str | None,
) -> None:
    """Measure SOURCE against real images: a checkpoint, a run directory, an official pickle, or images in a folder, zip
    or .npz.

    A network is sampled once for each of --nfe, image i with seed i and class i modulo the number of classes.
    """
    from tqdm import tqdm

    from edmdistill.checkpoints.aside import aside
    from edmdistill.checkpoints.convert import load_denoiser, load_model
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.protocol import evaluate, find_protocol, open_reference, results_json, results_table
    from edmdistill.evaluation.saved import checkpoint_to_save_in, save_results
    from edmdistill.sampling.load import pick_device
    from edmdistill.sampling.seeds import parse_seeds
    from edmdistill.sampling.times import parse_times

    if count and seeds:
        raise click.UsageError("--n N means the seeds 0 to N - 1, so it does not go with --seeds.")
    numbers = range(count) if count else parse_seeds(seeds) if seeds else None
    standard, where = find_protocol(protocol), pick_device(device)
    place = checkpoint_to_save_in(source) if save else None
    data = open_reference(ref, standard)
    model = source if is_images(source) else load_model(source, where)
    weaker = None if guide is None else load_denoiser(guide, where)
    levels = total = None
    if not isinstance(model, str):
        flow, total = model.flow, len(nfe) * (standard.n if numbers is None else len(numbers))
        if times is not None:
            levels = parse_times(times, sigma_data=flow.sigma_data, sigma_min=flow.sigma_min, sigma_max=flow.sigma_max)
    elif times is not None:
        raise click.UsageError("--t says how a network draws, but these images exist: leave it out.")
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
                solver=solver,
                seeds=numbers,
                batch=batch,
                device=where,
                source=source,
                on_progress=bar.update,
            )
            for evaluations in nfe
        ]
    document = results_json(results)
    if out is not None:
        with aside(out) as new:
            new.write_text(document + "\n", encoding="utf-8")
    if place is not None:
        save_results(place, results)
    click.echo(document if as_json else results_table(results))
