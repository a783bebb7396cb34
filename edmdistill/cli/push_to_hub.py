"""`edmdistill push-to-hub`."""

import sys
from pathlib import Path

import click


@click.command("push-to-hub")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="For nobody else to see.")
@click.option("--branch", metavar="NAME", help="Where to; made if it is not there.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--licence", help="Where the checkpoint knows none, or a stricter one; as the Hub writes it.")
@click.option("--dry-run", is_flag=True, help="Print what would be published, with the card, and send nothing.")
def command(
    source: Path,
    repository: str,
    private: bool,
    branch: str | None,
    message: str | None,
    licence: str | None,
    dry_run: bool,
) -> None:
    """Publish SOURCE, a checkpoint or a run directory, on the Hugging Face Hub.

    Weights, config.json, the card and a picture go there; states stay here. Then they are downloaded again and two
    samples compared. The same command goes on with a push that was interrupted.
    """
    from edmdistill.checkpoints.store import CARD
    from edmdistill.hub import pack, push

    package = pack(source, repository, licence)
    sizes = "".join(f"  {name:<18} {size:>14,} bytes\n" for name, size in package.sizes.items())
    click.echo(f"{repository}, under {package.config.provenance.licence}:\n{sizes}", nl=False, err=True)
    if dry_run:
        card = package.files[CARD]
        assert isinstance(card, bytes)
        click.echo(card.decode(), nl=False)
        return

    def show(stage: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"{stage} ...", err=True)

    done = push(package, private=private, branch=branch, message=message, note=show)
    had = "was there already" if done.unchanged else "is published"
    click.echo(f"{done.url} {had}; downloaded again, it draws the same, bit for bit. To draw from it:")
    click.echo(f"  edmdistill sample {repository}{f'@{branch}' if branch else ''} --seeds 0-63 --out images")
