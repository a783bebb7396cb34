"""`edmdistill export`: a checkpoint for another program."""

from pathlib import Path

import click

from edmdistill.cli.options import json_option, print_json, say_unfinished
from edmdistill.cli.types import OutputPath

TARGETS = "diffusers", "onnx", "torch-export", "nvidia", "space"


@click.command("export")
@click.argument("source")
@click.option("--to", type=click.Choice(TARGETS), required=True, help="Format of the export.")
@click.option("--out", type=OutputPath(moved=True), required=True, metavar="DIR", help="The folder to write.")
@click.option("--vae", metavar="DIR|ID", help="diffusers, space: what decodes latents, to be held by the export.")
@click.option("--overwrite", is_flag=True, help="Replace an existing export.")
@json_option
def command(source: str, to: str, out: Path, vae: str | None, overwrite: bool, as_json: bool) -> None:
    """Export SOURCE for another program, and print how closely it reproduces the images.

    SOURCE is a generator, a run, or (except for diffusers and space) a teacher. DIR gets a README.md with usage, and:

    \b
    diffusers     a pipeline with gamma-sampling, loaded with trust_remote_code, independent of edmdistill
    onnx          model.onnx: one network evaluation, any batch size
    torch-export  model.pt2: the same, for torch alone
    nvidia        model.safetensors with the official names, and network.json with the arguments of their class
    space         app.py and requirements.txt: a gradio demo, for a Space on the Hugging Face Hub

    EDM2's weight normalization and gains are folded into plain convolutions, except for nvidia and space.
    """
    from edmdistill.checkpoints.source import open_source
    from edmdistill.export.folder import export
    from edmdistill.export.parity import table
    from edmdistill.progress import stage_bar

    checkpoint = open_source(source)
    say_unfinished(checkpoint)
    with stage_bar("exporting") as on_progress:
        parity = export(checkpoint, to, out, vae=vae, overwrite=overwrite, on_progress=on_progress)
    if as_json:
        print_json(path=str(out), to=to, parity=[row._asdict() for row in parity])
        return
    click.echo(f"Largest relative difference from our images:\n\n{table(parity)}\n")
    click.echo(f"{out} is written: see {out / 'README.md'}.")
