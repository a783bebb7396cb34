"""`edmdistill recipes`: list, show, copy and check recipes."""

import shlex
from pathlib import Path

import click

from edmdistill.cli.options import print_json, sets_option
from edmdistill.cli.types import OutputPath
from edmdistill.errors import counted


@click.group("recipes")
def command() -> None:
    """List, show, copy and check recipes, the TOML files that define what a run computes.

    NAME is METHOD/DATASET, METHOD/DATASET-VARIANT, or the path of a .toml file.
    """


@command.command("list", short_help="List the recipes that ship with the package.")
@click.argument("method", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, including the headers.")
def list_(method: str | None, as_json: bool) -> None:
    """List the recipes that ship with the package, all or those of METHOD, and what each is for.

    The name of a recipe with sizes ends in one of them, as in cosim/imagenet512-s, and may end in a variant after it.
    """
    from edmdistill.methods import METHODS
    from edmdistill.recipes.library import recipe_files, recipe_header

    files = recipe_files(method)
    if as_json:
        recipes = [{"name": name, "header": recipe_header(file.path)} for file in files for name in file.names]
        print_json(recipes=recipes)
        return
    width = max(len(file.name) for file in files)
    for name in METHODS:
        of_method = [file for file in files if file.path.parent.name == name]
        if of_method:
            click.echo(METHODS[name].summary)
        for file in of_method:
            click.echo(f"  {file.name:<{width}}  {recipe_header(file.path).splitlines()[0]}")
            for title, words in (("sizes", file.sizes), ("variants", file.modes)):
                if words:
                    click.echo(f"  {'':<{width}}    {title}: {' '.join(f'-{word}' for word in words)}")


@command.command(short_help="Print a recipe, or all values that a run would use.")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="Print JSON, with the variant applied and every default filled in.")
@click.option("--method", metavar="METHOD", help="Method, for a file that names none.")
@sets_option
def show(name: str, resolved: bool, method: str | None, sets: tuple[str, ...]) -> None:
    """Print the recipe NAME: the file as it is, or all values that a run would use."""
    from edmdistill.recipes.library import find_recipe, load_recipe

    if (method or sets) and not resolved:
        raise click.UsageError("--method and --set need --resolved.")
    text = load_recipe(name, method, sets).to_json().decode() if resolved else find_recipe(name).text
    click.echo(text, nl=False)


@command.command(short_help="Copy a recipe to a file, to edit.")
@click.argument("name")
@click.argument("file", metavar="FILE.toml", type=OutputPath())
@click.option("--overwrite", is_flag=True, help="Replace FILE.toml.")
def copy(name: str, file: Path, overwrite: bool) -> None:
    """Copy the recipe NAME, with its variants, to FILE.toml, to edit and use with `train --recipe`."""
    from edmdistill.recipes.library import copy_recipe

    written = copy_recipe(name, file, overwrite=overwrite)
    click.echo(f"{file} is written; `--recipe {shlex.quote(str(written))}` trains with it.")


@command.command()
@click.argument("name")
@click.option("--method", metavar="METHOD", help="Method, for a file that names none.")
@sets_option
def validate(name: str, method: str | None, sets: tuple[str, ...]) -> None:
    """Check the recipe NAME, as `train` does before it starts."""
    from edmdistill.recipes.library import load_recipe

    recipe = load_recipe(name, method, sets)
    training = recipe.training
    click.echo(
        f"{name} is valid: {recipe.method_name}, {counted(training.images, 'image')} in batches of {training.batch:,}, "
        f"hash {recipe.hash:.12}."
    )
