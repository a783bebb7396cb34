"""`edmdistill data encode`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from edmdistill.cli.options import device_option, errors_once, interruptible, processes_option, say
from edmdistill.cli.types import Count, OutputPath
from edmdistill.errors import counted


@click.command("encode")
@click.argument("images", metavar="IMAGES")
@click.argument("out", type=OutputPath(".zip"), metavar="OUT.zip")
@click.option("--vae", required=True, metavar="DIR|ID", help="Folder or Hub id of diffusers' AutoencoderKL.")
@click.option(
    "--range",
    "pixels",
    type=click.Choice(["edm2", "scm"]),
    default="edm2",
    show_default=True,
    help="Of the pixels that the VAE sees: [0, 1], as EDM2's teachers expect, or sCM's [-1, 1].",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.zip, or one that was begun with other options.")
@click.option("--xflip", is_flag=True, help="Encode every image mirrored, too.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the VAE.")
@click.option("--batch", type=Count(1, 4096), default=8, show_default=True, help="Images at a time, at most.")
@device_option
@processes_option
def command(
    images: str,
    out: Path,
    vae: str,
    pixels: Literal["edm2", "scm"],
    overwrite: bool,
    xflip: bool,
    dtype: str,
    batch: int,
    device: str | None,
    processes: int | None,
) -> None:
    """Encode IMAGES, a zip or a folder, into a VAE's latents, in the layout of EDM2's data sets.

    OUT.zip holds the mean and the standard deviation of each image's latents, and dataset.json with the classes, the
    VAE, the range and what was measured. After Ctrl-C or a kill, the same command goes on, on another number of
    processes too.
    """
    from edmdistill.machine.launch import init_from_environment, launch, process_rank, without_processes

    init_from_environment()
    from edmdistill.atomic import require_free
    from edmdistill.data.latent_zip import read_request

    rank, world = process_rank()
    with errors_once():
        require_free(out, overwrite or read_request(out) is not None)
    if processes is not None and processes > 1:
        from edmdistill.checkpoints.vae import require_vae

        require_vae(vae, download=True)  # once, by this process
        sys.exit(launch(without_processes(sys.argv[1:]), processes, device=device, on_message=say))

    import torch

    from edmdistill.checkpoints.vae import read_vae
    from edmdistill.data.datasets import open_dataset
    from edmdistill.data.encode import EncodeJob, compare_statistics
    from edmdistill.machine.devices import process_device
    from edmdistill.progress import DELAY, progress_bar

    with errors_once():
        where, precision = process_device(device), torch.float32 if dtype == "fp32" else torch.bfloat16
        data = open_dataset(images, xflip=xflip)
        encoder = read_vae(vae, where, precision, download=True)
        encoder.batch = batch
        job = EncodeJob(data, encoder, pixels, out, rank, world, overwrite=overwrite)
    tell = say if rank == 0 else lambda sentence: None
    for note in data.notes:
        tell(note)
    if job.zip.finished:
        tell(f"{out} already holds {counted(len(data), 'latent')} of this set.")
        return
    kept = f"what is encoded is kept in {job.zip.folder}; the same command goes on"
    with interruptible(lambda: kept), progress_bar(len(data), delay=float("inf") if rank else DELAY) as bar:
        job.encode(lambda written: bar.update(written - bar.n))
        measured = job.finish()
    if measured is not None:
        for line in compare_statistics(measured, encoder.statistics(pixels), len(data)):
            say(line)
        size = job.zip.shape[-1]
        say(f"{out}: {counted(len(data), 'latent')} of {size}x{size} with {counted(encoder.channels, 'channel')}")
