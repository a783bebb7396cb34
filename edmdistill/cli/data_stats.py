"""`edmdistill data stats`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from edmdistill.cli.measurements import SharingOptions, shared, sharing_options
from edmdistill.cli.options import interruptible, say, split_option
from edmdistill.cli.types import FEATURES, Count, NamedFile, NameList, OutputPath
from edmdistill.errors import counted


@click.command("stats")
@click.argument("source", metavar="SET")
@click.argument("out", type=OutputPath(".npz"), metavar="OUT.npz")
@click.option(
    "--features",
    type=NameList(FEATURES),
    default="inception,dinov2",
    show_default=True,
    metavar="LIST",
    help=f"Feature spaces: {', '.join(FEATURES)}.",
)
@click.option(
    "--weights",
    type=NamedFile(FEATURES),
    multiple=True,
    metavar="NAME=FILE",
    help="Weights of a feature space; may be given for each.  [default: the official ones]",
)
@click.option(
    "--keep-features",
    "keep",
    type=Count(1),
    metavar="N",
    help="Keep the features of N images too, for kid, precision, recall, density and coverage.",
)
@split_option
@click.option("--overwrite", is_flag=True, help="Replace OUT.npz.")
@sharing_options
def command(
    source: str,
    out: Path,
    features: tuple[str, ...],
    weights: tuple[tuple[str, Path], ...],
    keep: int | None,
    split: str,
    overwrite: bool,
    sharing: SharingOptions,
) -> None:
    """Write the statistics of a data set, against which `eval --ref OUT.npz` measures.

    SET is a zip, a folder, or the word digits or tiles. All its images are read once, for all feature spaces.
    After Ctrl-C or a kill the same command goes on, on another number of processes too.
    """
    files = dict(weights)
    if unused := files.keys() - features:
        raise click.UsageError(
            f"--weights {min(unused)}=... is of a feature space that --features does not name: add it there, or leave "
            "--weights out."
        )

    from edmdistill.atomic import require_free
    from edmdistill.data.datasets import open_dataset
    from edmdistill.evaluation.collect import collect_statistics, holds_statistics, write_statistics
    from edmdistill.features.spaces import load_features
    from edmdistill.machine.devices import process_device
    from edmdistill.progress import progress_bar

    with closing(sharing.open_work()) as work, shared(sharing) as processes:
        where, data = process_device(sharing.device), open_dataset(source, split=split)
        spaces = {name: load_features(name, files.get(name), where) for name in features}
        for note in data.notes:
            say(note)
        if not overwrite and holds_statistics(out, data, spaces, keep or 0):
            say(f"{out} already holds these statistics.")
            return
        require_free(out, overwrite)
        kept = f"what is measured is kept in {work.root}; the same command goes on"
        with interruptible(lambda: kept), progress_bar(len(data)) as bar:
            collected = collect_statistics(
                data,
                spaces,
                keep=keep or 0,
                device=where,
                work=work,
                processes=processes,
                on_progress=bar.update,
            )
        if collected is not None:
            write_statistics(out, *collected)
            work.remove()
            say(f"{out}: {counted(len(data), 'image')} in {', '.join(spaces)}")
