"""`edmdistill convert`."""

from pathlib import Path
from typing import Any, Literal

import click

from edmdistill.cli.options import json_option, say
from edmdistill.cli.types import OutputPath


@click.command()
@click.argument("source")
@click.argument("out", type=OutputPath(moved=True))
@click.option(
    "--time-embedding",
    type=click.Choice(["positional"]),
    help="Make the network read t, as continuous-time consistency models need; it must be trained further afterwards.",
)
@click.option(
    "--double-norm/--no-double-norm",
    default=None,
    help="With --time-embedding: adaptive double normalization.  [default: if the network supports it]",
)
@click.option(
    "--generator",
    type=click.Choice(["sid", "dmd2", "consistency-model", "ctm", "ect"]),
    help="SOURCE is a generator that was published for this method, to be sampled and measured.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option(
    "--parity",
    type=click.Choice(["full", "quick", "none"]),
    help="Compare the result with its source: full on images of the network's size, quick on small ones.  "
    "[default: quick]",
)
@click.option("--licence", help="Licence of the weights, as the Hub writes it.  [default: their publisher's]")
@json_option
def command(
    source: str,
    out: Path,
    time_embedding: Literal["positional"] | None,
    double_norm: bool | None,
    generator: str | None,
    overwrite: bool,
    parity: Literal["full", "quick", "none"] | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Convert an official checkpoint to ours, and print the conversion error by noise level.

    SOURCE is a file, an http(s) URL, a file on the Hub (hf://OWNER/NAME/FILE), a name of `edmdistill fetch list`, or
    the word digits or tiles: a network pickle of NVIDIA's EDM or EDM2, whose code is not executed, or OpenAI's
    edm_imagenet64_ema.pt. OUT becomes a folder with config.json, model.safetensors and README.md. Running it again does
    nothing. With --time-embedding, SOURCE may be such a folder.
    """
    if generator is not None and (time_embedding, double_norm, parity) != (None, None, None):
        raise click.UsageError(
            "--time-embedding, --double-norm and --parity are for teachers, not for --generator: leave them out."
        )

    import msgspec

    from edmdistill.checkpoints.source import open_source
    from edmdistill.errors import printable, without_secrets

    checkpoint = open_source(source)
    if generator is None and checkpoint.path.is_file() and not checkpoint.is_archive:
        _ = checkpoint.official  # read before torch is imported: a bad file is refused at once
    from edmdistill.checkpoints.conversion_report import ConversionReport, GeneratorReport
    from edmdistill.checkpoints.convert import convert
    from edmdistill.checkpoints.noise_dependence import generator_warning
    from edmdistill.checkpoints.published_generators import convert_generator
    from edmdistill.progress import stage_bar

    report: ConversionReport | GeneratorReport
    shared: dict[str, Any] = {"overwrite": overwrite, "licence": licence}
    with stage_bar("converting") as on_progress:
        if generator is None:
            shared |= {"time_embedding": time_embedding, "double_norm": double_norm, "parity": parity or "quick"}
            report = convert(checkpoint, out, on_progress=on_progress, **shared)
        else:
            on_progress("reading")
            report = convert_generator(checkpoint, out, generator, **shared)
    warning = generator_warning(report.config.noise_dependence, source)
    if warning is not None:
        say(warning)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report.document())).decode())
    else:
        click.echo(report.describe(printable(without_secrets(source))))
