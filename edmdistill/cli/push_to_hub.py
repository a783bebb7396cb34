"""`edmdistill push-to-hub`."""

import shlex
import sys
from pathlib import Path

import click

from edmdistill.cli.options import say, say_unfinished
from edmdistill.cli.types import InputPath


@click.command("push-to-hub")
@click.argument("source", type=InputPath())
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--branch", metavar="NAME", help="Branch to push to, created if missing.  [default: main]")
@click.option("--message", metavar="TEXT", help="Commit message.")
@click.option(
    "--licence",
    help="Licence of the weights, if the checkpoint has none or a stricter one is wanted; the Hub's identifier.",
)
@click.option("--vae", metavar="DIR|ID", help="What decodes latents for the picture.  [default: the one in the cache]")
@click.option(
    "--replace",
    "replace_model",
    is_flag=True,
    help="Replace another model in the repository; files of other names stay.",
)
@click.option("--overwrite-card", is_flag=True, help="Replace a README.md or samples.png made by hand.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the files, the card and whether the Hub would take them; upload nothing.",
)
def command(
    source: Path,
    repository: str,
    private: bool,
    branch: str | None,
    message: str | None,
    licence: str | None,
    vae: str | None,
    replace_model: bool,
    overwrite_card: bool,
    dry_run: bool,
) -> None:
    """Publish SOURCE, a checkpoint or a run directory, on the Hugging Face Hub.

    Uploads the weights, config.json, the card and a picture, but no training state; then downloads them and compares
    two samples. Run it again to resume an interrupted push. By default, it refuses a repository with another model, and
    keeps a card or a picture made or edited by hand.
    """
    from edmdistill.checkpoints.encoder import vae_words
    from edmdistill.errors import HubUnreachable
    from edmdistill.publish.hub import build_package, push, rehearse

    say_unfinished(str(source))
    package = build_package(source, repository, licence, vae, branch)
    sizes = "".join(f"  {name:<18} {size:>14,} bytes\n" for name, size in package.sizes.items())
    say(f"{repository}, under {package.config.provenance.licence}:\n{sizes}".rstrip())
    terms = {"private": private, "replace_model": replace_model, "overwrite_card": overwrite_card}
    if dry_run:
        click.echo(package.card.decode(), nl=False)
        try:
            plan = rehearse(package, **terms)
        except HubUnreachable as error:
            say(f"The Hub was not asked: {error}")
            return
        _say_kept(plan.kept if plan else ())
        say(f"The Hub takes it{'' if plan else ', as a new repository'}; nothing was uploaded.")
        return

    def show(stage: str) -> None:
        if sys.stderr.isatty():
            say(f"{stage} ...")

    done = push(
        package,
        message=message,
        on_message=show,
        **terms,
    )
    _say_kept(done.kept)
    status = "was already published" if done.unchanged else "is published"
    click.echo(f"{done.url} {status}; a fresh download has the same bytes and samples. To sample from it:")
    address = f"{repository}@{branch}" if branch else repository
    words = ["edmdistill", "sample", address, "--seeds", "0-63", *vae_words(package.config.encoder), "--out", "images"]
    click.echo(f"  {shlex.join(words)}")


def _say_kept(names: tuple[str, ...]) -> None:
    for name in names:
        say(f"The {name} there was edited by hand and is kept: --overwrite-card replaces it.")
