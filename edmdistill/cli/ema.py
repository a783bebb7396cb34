"""`edmdistill ema`."""

from collections.abc import Callable
from pathlib import Path

import click

from edmdistill.cli.options import FiniteFloat, OutputPath


@click.command("ema")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--sigma-rel",
    type=FiniteFloat(0.001, 12**-0.5),
    required=True,
    help="Length of the average, as a share of the training: 0.05.",
)
@click.option(
    "--images", type=click.IntRange(min=1), help="The average after so many images.  [default: the last there is]"
)
@click.option("--out", type=OutputPath(), required=True, help="The checkpoint to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is at OUT.")
def command(source: Path, sigma_rel: float, images: int | None, out: Path, overwrite: bool) -> None:
    """Put an average of the weights of another length together, after training.

    SOURCE is a run whose recipe has ema.snapshot_every, or a folder of the official trainer's
    network-snapshot-KIMG-SIGMA.pkl.
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
