"""`edmdistill sweep`: a network's metrics over numbers of evaluations and gammas."""

from pathlib import Path

import click

PLOTS = ".svg", ".html", ".png", ".pdf"


def numbers(context: click.Context, option: click.Parameter, text: str | None) -> list[float | None]:
    """Reads 0,.5,1."""
    try:
        return [None] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, as 0,.5,1 is.") from None


def integers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    """Reads 1,2,4."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, as 1,2,4 is.") from None


def plot_file(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() not in PLOTS:
        raise click.BadParameter(f"{file} is no picture that is drawn here: name one of {', '.join(PLOTS)}.")
    return file


@click.command("sweep")
@click.argument("source")
@click.option("--protocol", required=True, metavar="NAME", help="How to measure: digits, pixels.")
@click.option("--ref", metavar="DATA", help="Real images: a zip, a folder, or digits.  [default: the protocol's own]")
@click.option(
    "--nfe", "steps", required=True, metavar="LIST", callback=integers, help="Network evaluations, as in 1,2,4,8."
)
@click.option(
    "--gamma",
    "gammas",
    metavar="LIST",
    callback=numbers,
    help="Generator: shares of fresh noise, as in 0,.5,1.  [default: the checkpoint's]",
)
@click.option("--n", "count", type=click.IntRange(min=2), help="Images: seeds 0 to N - 1.  [default: the protocol's]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document, as eval does.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.json", help="Also write it here.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg|.html|.png|.pdf",
    callback=plot_file,
    help="Draw the first metric over NFE, a curve for each gamma; .png and .pdf take matplotlib.",
)
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
def command(
    source: str,
    protocol: str,
    ref: str | None,
    steps: list[int],
    gammas: list[float | None],
    count: int | None,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
    batch: int,
    device: str | None,
) -> None:
    """Measure SOURCE, a checkpoint, a run directory or an official pickle, at every number of evaluations and gamma.

    Each is what `eval` measures with that --nfe and --gamma, with the same seeds.
    """
    from tqdm import tqdm

    from edmdistill.atomic import atomic_write
    from edmdistill.checkpoints.convert import load_model
    from edmdistill.evaluation.protocol import evaluate, find_protocol, open_reference, results_json
    from edmdistill.evaluation.tables import sweep_table
    from edmdistill.report.page import draw
    from edmdistill.sampling.load import pick_device

    standard, where = find_protocol(protocol), pick_device(device)
    data = open_reference(ref, standard)
    model = load_model(source, where)
    seeds = range(count or standard.n)
    with tqdm(total=len(steps) * len(gammas) * len(seeds), unit="image", delay=3) as bar:
        results = [
            evaluate(
                model,
                data,
                protocol=protocol,
                nfe=nfe,
                gamma=gamma,
                seeds=seeds,
                batch=batch,
                device=where,
                source=source,
                on_progress=bar.update,
            )
            for gamma in gammas
            for nfe in steps
        ]
    document, table = results_json(results), sweep_table(results)
    if out is not None:
        with atomic_write(out) as new:
            new.write_text(document + "\n", encoding="utf-8")
    if plot is not None:
        with atomic_write(plot) as new:
            draw(table, source, new, plot.suffix.lower())
    click.echo(document if as_json else table.to_text())
