"""`edmdistill fetch`: official files, once, into the cache."""

from dataclasses import asdict

import click

from edmdistill.cli.options import json_option, print_json


@click.command("fetch")
@click.argument("names", metavar="NAME...|list", nargs=-1, required=True)
@click.option("--verify", is_flag=True, help="Check what the files hold, and say how to reproduce a published result.")
@json_option
def command(names: tuple[str, ...], verify: bool, as_json: bool) -> None:
    """Download official files once into the cache, and check their sha256.

    NAME is inception, dinov2, vae, the name of a teacher or a reference, or a preset of EDM2, such as
    edm2-img512-s-guid-fid, for a network and its guide. `edmdistill fetch list` lists them. Each has the licence of its
    authors.
    """
    if "list" in names and (verify or len(names) > 1):
        raise click.UsageError("`fetch list` downloads nothing: give it alone, or the names without it.")

    from edmdistill.checkpoints.official_files import documents, fetch, find_official, to_text

    if names == ("list",):
        if as_json:
            print_json(**documents())
        else:
            click.echo(to_text())
        return
    names = names[1:] if names[0] == "teacher" and len(names) > 1 else names
    files = {file.name: file for name in names for file in find_official(name)}
    files_fetched = [fetch(file) for file in files.values()]
    checks: dict[str, list[str]] = {}
    if verify:
        from edmdistill.evaluation.official import verify_official

        checks = {name: verify_official(name) for name in names}
    if as_json:
        fetched = [asdict(one) | {"path": str(one.path)} for one in files_fetched]
        print_json(fetched=fetched, checks=checks)
        return
    for line in [*map(str, files_fetched), *(line for lines in checks.values() for line in lines)]:
        click.echo(line)
