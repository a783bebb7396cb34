"""edmdistill train: a teacher from data, or a generator from a teacher."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import click

METHODS = ("diffusion", "cosim", "sid")


@click.command("train")
@click.argument("method", type=click.Choice(METHODS))
@click.argument("teacher", required=False)
@click.option("--data", required=True, help="A zip or folder of images, or the word digits.")
@click.option("--recipe", required=True, help="A recipe's name, as in cosim/digits, or a .toml file.")
@click.option("--run-dir", required=True, type=click.Path(path_type=Path), help="Where the run lives; made if new.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Change the recipe; may be repeated.")
@click.option("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one.")
@click.option("--dry-run", is_flag=True, help="Print as JSON what would be trained, and start nothing.")
def command(
    method: str,
    teacher: str | None,
    data: str,
    recipe: str,
    run_dir: Path,
    sets: tuple[str, ...],
    device: str | None,
    dry_run: bool,
) -> None:
    """Train by METHOD; a method that distils takes TEACHER, a checkpoint of ours or an official one.

    Ctrl-C saves the run; the same command goes on with it.
    """
    from tqdm import tqdm

    from edmdistill.recipes import find_recipe, load_recipe
    from edmdistill.training.loop import train
    from edmdistill.training.run import prepare

    resolved = load_recipe(recipe, method, sets)
    run = prepare(resolved, data=data, teacher=teacher, device=device)
    plan = run.plan()
    if dry_run:
        click.echo(json.dumps(plan, indent=2))
        return

    roles = ", ".join(
        f"{role} ({part['parameters']:,} parameters{'' if part['trained'] else ', frozen'})"
        for role, part in plan["roles"].items()
    )
    click.echo(f"Training {method} on {data} by recipe {recipe} in {run_dir}, on {plan['device']}: {roles}.", err=True)
    for sentence in run.method.notes():
        click.echo(sentence, err=True)

    training, bar = resolved.training, None
    interval = 0.2 if sys.stderr.isatty() else 30
    with ExitStack() as stack:

        def show(images: int, measures: dict[str, float]) -> None:
            nonlocal bar
            if bar is None:  # at the first round, for a resumed run's first images are not this process's speed
                start = images - training.batch
                bar = tqdm(total=training.images, initial=start, unit="img", unit_scale=True, mininterval=interval)
                stack.enter_context(bar)
            losses = {k.removeprefix("loss/"): v for k, v in measures.items() if not k.startswith(("grad_norm", "lr"))}
            bar.set_postfix(losses, refresh=False)
            bar.update(min(images, training.images) - bar.n)

        recipe_text = _as_given(recipe, sets, find_recipe(recipe)[0])
        outcome = train(run, run_dir, recipe_text=recipe_text, on_round=show, note=_say)
    if not outcome.finished:
        _say(f"Interrupted after {outcome.images:,} images and saved; the same command goes on from there.")
        sys.exit(130)
    nfe = 2 if 2 in resolved.sampling.nfe else resolved.sampling.nfe[0]
    _say(f"The {run.method.product} of {outcome.images:,} images is in {run_dir / 'generator'}. To draw from it:")
    _say(f"  edmdistill sample {run_dir} --nfe {nfe} --seeds 0-63 --out {run_dir / 'images'}")


def _say(sentence: str) -> None:
    """A line on stderr that a progress bar survives."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stderr)


def _as_given(name: str, sets: tuple[str, ...], file: Path) -> str:
    """The recipe's own text, headed by how it was asked for."""
    asked = "".join(f"\n#   --set {override}" for override in sets)
    return f"# Trained by --recipe {name}{asked}\n\n{file.read_text(encoding='utf-8')}"
