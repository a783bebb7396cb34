"""`edmdistill data stats`."""

from __future__ import annotations

from pathlib import Path

import click

from edmdistill.cli.options import BATCH, FEATURES, NamedFile, NameList, OutputPath, say


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
    type=click.IntRange(1),
    metavar="N",
    help="Keep the features of N images too, for kid, precision, recall, density and coverage.",
)
@click.option("--split", default="train", show_default=True, help="Split of the digits: train, test or all.")
@click.option("--batch", type=BATCH, default=256, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
def command(
    source: str,
    out: Path,
    features: list[str],
    weights: tuple[tuple[str, Path], ...],
    keep: int | None,
    split: str,
    batch: int,
    device: str | None,
) -> None:
    """Write the statistics of a data set, against which `eval --ref OUT.npz` measures.

    SET is a zip, a folder, or the word digits. All its images are read once, for all feature spaces.
    """
    from edmdistill.data.datasets import open_dataset
    from edmdistill.evaluation.collect import collect_statistics, write_statistics
    from edmdistill.features.spaces import load_features
    from edmdistill.machine.devices import pick_device
    from edmdistill.progress import progress_bar

    files = dict(weights)
    if unused := files.keys() - features:
        raise click.UsageError(f"--weights {min(unused)}=... is of a feature space that --features does not name.")
    where = pick_device(device)
    spaces = {name: load_features(name, files.get(name), where) for name in features}
    data = open_dataset(source, split=split)
    for note in data.notes:
        say(note)
    with progress_bar(len(data)) as bar:
        about, statistics = collect_statistics(
            data, spaces, keep=keep or 0, batch=batch, device=where, on_progress=bar.update
        )
    write_statistics(out, about, statistics)
    say(f"{out}: {about.n:,} images in {', '.join(spaces)}")
