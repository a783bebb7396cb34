"""`edmdistill loss`: the diffusion loss by noise level."""

import click

from edmdistill.cli.options import device_option, interruptible, json_option, print_json, say_unfinished, split_option
from edmdistill.cli.types import BATCH, Count


@click.command("loss")
@click.argument("teacher")
@click.argument("original", required=False)
@click.option(
    "--data", metavar="DATA", required=True, help="A zip or folder of images or latents, or the word digits or tiles."
)
@split_option
@click.option("--images", type=Count(min=1), help="Number of images.  [default: 1000, or all of fewer]")
@click.option("--batch", type=BATCH, default=250, show_default=True, help="Images per batch.")
@device_option
@json_option
def command(
    teacher: str,
    original: str | None,
    data: str,
    split: str,
    images: int | None,
    batch: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure the diffusion loss of TEACHER by noise level, and compare it with that of ORIGINAL.

    This shows whether a teacher that was changed by `convert --time-embedding positional`, and trained further, is as
    good as before. Both are checkpoints, run directories or official files.
    """
    from edmdistill.evaluation.noise_levels import losses_by_noise, table, verdict
    from edmdistill.machine.devices import pick_device

    sources = [teacher, original] if original else [teacher]
    say_unfinished(*sources)
    with interruptible(lambda: "nothing is measured yet."):
        rows = losses_by_noise(sources, data, split=split, images=images, batch=batch, device=pick_device(device))
    if as_json:
        print_json(sources=sources, losses=[row._asdict() for row in rows])
        return
    click.echo(table(rows))
    if original:
        click.echo(verdict(rows))
