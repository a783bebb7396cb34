"""`edmdistill ema`."""

from collections.abc import Callable
from pathlib import Path

import click

from edmdistill.cli.types import Count, FiniteFloat, OutputPath


@click.command("ema")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--sigma-rel",
    type=FiniteFloat(0.001, 0.2886),  # below 1 / sqrt(12), that of an average of everything
    required=True,
    help="Relative length of the average (EDM2), such as 0.05.",
)
@click.option(
    "--images", type=Count(min=1), help="Images seen at the end of the average.  [default: the last snapshot]"
)
@click.option("--out", type=OutputPath(moved=True), required=True, help="The checkpoint to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
def command(source: Path, sigma_rel: float, images: int | None, out: Path, overwrite: bool) -> None:
    """Reconstruct a moving average of another length after training (post-hoc EMA).

    SOURCE is a run whose recipe has ema.snapshot_every, or a folder with the official trainer's
    network-snapshot-KIMG-SIGMA.pkl files.
    """
    from edmdistill.checkpoints.posthoc_ema import reconstruct_checkpoint
    from edmdistill.progress import progress_bar

    with progress_bar(unit="average") as bar:

        def start(count: int) -> Callable[[int], object]:
            bar.total = count
            update: Callable[[int], object] = bar.update
            return update

        config = reconstruct_checkpoint(source, out, sigma_rel, images, overwrite=overwrite, on_start=start)
    made = config.ema or {}
    click.echo(
        f"{out} is written: the {config.stage} with sigma_rel {sigma_rel:g} after {made['images']:,} images, from "
        f"{len(made['from'])} averages, which meet its profile to within {made['misfit']:.1%}."
    )
