"""`edmdistill diagnose`: where a generator is weak, and why."""

from pathlib import Path

import click

from edmdistill.cli.options import device_option, interruptible, json_option, print_json, say_unfinished
from edmdistill.cli.types import BATCH, FEATURES, PROTOCOLS, Count, Name, NamedFile


@click.command("diagnose")
@click.argument("source")
@click.option("--protocol", type=Name(PROTOCOLS), required=True, help="Gives the features that images are compared in.")
@click.option("--teacher", metavar="TEACHER", help="What it was distilled from, to compare with.")
@click.option(
    "--ref",
    metavar="DATA",
    help="Real images: a zip, a folder, an .npz, digits or tiles; or statistics of them.  "
    "[default: the protocol's own]",
)
@click.option(
    "--data", metavar="DATA", help="What jumps start from: a zip or a folder of images or latents.  [default: --ref]"
)
@click.option(
    "--vae", metavar="DIR|ID", help="Latents: the VAE that decodes them.  [default: the checkpoint's, if cached]"
)
@click.option(
    "--weights",
    type=NamedFile(FEATURES),
    metavar="NAME=FILE",
    help="Weights of the protocol's feature space, as in inception=FILE.  [default: the official ones]",
)
@click.option("--n", "count", type=Count(2), default=3000, show_default=True, help="Jumps from each level.")
@click.option("--batch", type=BATCH, default=250, show_default=True, help="Images per batch.")
@device_option
@json_option
def command(
    source: str,
    protocol: str,
    teacher: str | None,
    ref: str | None,
    data: str | None,
    vae: str | None,
    weights: tuple[str, Path] | None,
    count: int,
    batch: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure single jumps of the generator SOURCE from real images with noise, and say at which levels it is weak.

    SOURCE is a generator or a run directory. With --teacher its denoiser stands beside; if SOURCE is a run whose method
    has an auxiliary score, the gap between the two scores is measured too, by the levels s and t of jumps. Jumps of a
    generator of latents start from the latents of --data, and their pictures are compared with --ref.
    """
    from edmdistill.evaluation.diagnosis import diagnose, sentences
    from edmdistill.machine.devices import pick_device

    say_unfinished(source, teacher)
    with interruptible(lambda: "nothing is measured yet."):
        diagnosis = diagnose(
            source,
            protocol=protocol,
            teacher=teacher,
            reference=ref,
            data=data,
            vae=vae,
            weights={} if weights is None else dict([weights]),
            count=count,
            device=pick_device(device),
            batch=batch,
        )
    if as_json:
        tables = {name: [row._asdict() for row in rows] for name, rows in diagnosis._asdict().items()}
        print_json(source=source, **tables, sentences=sentences(diagnosis))
        return
    click.echo(f"{'sigma':>8} {'generator':>10} {'teacher':>10}" if teacher else f"{'sigma':>8} {'generator':>10}")
    for jump in diagnosis.jumps:
        beside = "" if jump.teacher is None else f" {jump.teacher:10.3g}"
        click.echo(f"{jump.sigma:8g} {jump.generator:10.3g}{beside}")
    for gap in diagnosis.gaps:
        click.echo(f"s {gap.sigma_s:g}, t {gap.sigma_t:g}: gap {gap.gap:.3g}, sensitivity {gap.sensitivity:.2g}")
    for sentence in sentences(diagnosis):
        click.echo(sentence)
