"""`edmdistill train`: a teacher from data, or a generator from a teacher."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edmdistill.cli.machine_options import MachineOptions, machine_options
from edmdistill.cli.options import (
    device_option,
    errors_once,
    processes_option,
    say,
    sets_option,
)
from edmdistill.cli.types import Count, Memory, Name, NameList, OutputPath
from edmdistill.errors import TrainingError, counted
from edmdistill.methods import METHODS

if TYPE_CHECKING:
    from edmdistill.machine.engine import Machine
    from edmdistill.recipes.schema import Recipe
    from edmdistill.training.run import Run

TRACKERS = ("tensorboard", "wandb")
ALARMS = ("collapse", "saturation", "runaway", "quality", "nan")


@click.command("train", epilog="\b\n" + "\n".join(f"{name:<10} {entry.summary}" for name, entry in METHODS.items()))
@click.argument("method", type=Name(METHODS), metavar="METHOD")
@click.argument("teacher", required=False)
@click.option("--guide", metavar="SOURCE", help="The network that guides the teacher, if the recipe asks for one.")
@click.option(
    "--force-guidance", is_flag=True, help="Let a teacher guide itself that was never trained without its classes."
)
@click.option(
    "--data", metavar="DATA", required=True, help="A zip or folder of images or latents, or the word digits or tiles."
)
@click.option(
    "--recipe", metavar="NAME|FILE", required=True, help="A recipe's name, as in cosim/digits, or a .toml file."
)
@click.option("--init", metavar="GENERATOR", help="Start from this generator: a checkpoint, a run or RUN/state/IMAGES.")
@click.option(
    "--vae",
    metavar="DIR|ID",
    help="What decodes latents in grids and [evaluation].  [default: the teacher's, if cached]",
)
@click.option(
    "--run-dir", metavar="DIR", required=True, type=OutputPath(filled=True), help="Where the run lives; made if new."
)
@sets_option
@device_option
@processes_option
@click.option("--micro-batch", metavar="N|auto", help="Most images of one forward pass; auto: the most that fit.")
@click.option(
    "--fit",
    type=Memory(),
    help="Choose --micro-batch, --offload, --checkpoint-activations, --loss-pieces and --second-moment by the plan: "
    "the fastest that fits; auto: this GPU.",
)
@machine_options()
@click.option(
    "--workers", type=Count(min=0), help="Data readers a process.  [default: 0 on a CPU, up to 4 beside a GPU]"
)
@click.option(
    "--log-with",
    type=NameList(TRACKERS),
    default=(),
    help="Where metrics and grids go as well: into RUN/tensorboard; into the project edmdistill of wandb.",
)
@click.option("--stop-on", type=NameList(ALARMS), default=(), help="Which alarms end the run; nan does in any case.")
@click.option("--profile", type=Count(min=1), help="Trace so many rounds, after 3 others, into RUN/profile.")
@click.option("--dry-run", is_flag=True, help="Print as JSON what would be trained, and start nothing.")
def command(
    method: str,
    teacher: str | None,
    guide: str | None,
    force_guidance: bool,
    data: str,
    recipe: str,
    init: str | None,
    vae: str | None,
    run_dir: Path,
    sets: tuple[str, ...],
    device: str | None,
    processes: int | None,
    micro_batch: str | None,
    fit: float | str | None,
    options: MachineOptions,
    workers: int | None,
    log_with: tuple[str, ...],
    stop_on: tuple[str, ...],
    profile: int | None,
    dry_run: bool,
) -> None:
    """Train by METHOD; a method that distills takes TEACHER, a checkpoint of ours or an official one.

    METHOD is one of those below. Ctrl-C saves the run; the same command resumes it, on another number of processes too.
    torchrun, accelerate launch and srun start it on several machines.
    """
    from edmdistill.machine.launch import init_from_environment, launch, without_processes
    from edmdistill.recipes.library import find_recipe

    init_from_environment()
    size = _micro_batch(micro_batch)
    if processes is not None and processes > 1:
        from edmdistill.machine.devices import named_device
        from edmdistill.machine.gpu_options import require_gpu

        # What can be refused at once is not left to the processes, which take a while to start.
        find_recipe(recipe).resolve(method, sets)
        for option, value in (("--micro-batch auto", size), ("--fit auto", fit)):
            if value == "auto":
                require_gpu(named_device(device), option)
        sys.exit(launch(without_processes(sys.argv[1:]), processes, device=device, on_message=say))

    with errors_once(), _starting() as stage:
        stage("loading PyTorch")
        from edmdistill.training.checks import require_measured
        from edmdistill.training.prepare import prepare

        machine = options.machine(device=device, micro_batch=size, workers=workers, log_with=log_with)
        source = find_recipe(recipe)
        resolved = source.resolve(method, sets)
        require_measured(resolved, stop_on)
        machine, notes = _fitted(fit, resolved, machine, data=data, teacher=teacher, guide=guide, init=init)
        stage("reading teacher and data")
        run = prepare(
            resolved,
            data=data,
            teacher=teacher,
            guide=guide,
            machine=machine,
            force_guidance=force_guidance,
            init=init,
            vae=vae,
        )
    run.notes = (*notes, *run.notes)
    try:
        text = source.text_with_command(sets)
        _train(run, f"{method} on {data} by recipe {recipe}", run_dir, text, stop_on, dry_run, profile)
    finally:
        run.engine.close()


def _starting() -> AbstractContextManager[Callable[[str], object]]:
    """Returns a stage_bar of what comes before the training, on the main process alone."""
    from edmdistill.machine.launch import process_rank
    from edmdistill.progress import stage_bar

    return stage_bar("starting") if process_rank()[0] == 0 else nullcontext(lambda stage: None)


def _train(
    run: "Run", what: str, run_dir: Path, recipe_text: str, stop_on: tuple[str, ...], dry_run: bool, profile: int | None
) -> None:
    """Trains, with a progress bar and sentences on stderr, from the main process alone."""
    from edmdistill.checkpoints.encoder import vae_words
    from edmdistill.training.profiling import traced
    from edmdistill.training.run_dir import check_run
    from edmdistill.training.session import train

    tell = say if run.engine.is_main else lambda sentence: None
    if dry_run:
        if run.engine.is_main:
            check_run(run_dir, run.recipe.to_json(), run.identity)
            for sentence in _notes(run):
                say(sentence)
            click.echo(json.dumps(run.describe(), indent=2))
        return
    with ExitStack() as stack:
        trace = stack.enter_context(traced(run, run_dir, profile, tell))
        show = _progress(run, stack) if run.engine.is_main else lambda images, measures: None
        outcome = train(
            run,
            run_dir,
            recipe_text=recipe_text,
            stop_on=stop_on,
            on_start=lambda: [tell(sentence) for sentence in _introduction(run, what, run_dir)],
            on_round=lambda images, measures: (show(images, measures), trace()),
            on_message=tell,
        )
    if not outcome.finished:
        tell(f"Interrupted after {counted(outcome.images, 'image')} and saved; the same command goes on from there.")
        sys.exit(130)
    steps = run.recipe.sampling.nfe
    nfe = 2 if 2 in steps else steps[0]
    tell(
        f"The {run.method.product} of {counted(outcome.images, 'image')} is in {run_dir / 'generator'}. To draw from "
        "it:"
    )
    words = vae_words(run.config.encoder) if run.vae is None else ["--vae", run.vae]
    decoding = "".join(f" {shlex.quote(word)}" for word in words)
    source, out = shlex.quote(str(run_dir)), shlex.quote(str(run_dir / "images"))
    tell(f"  edmdistill sample {source} --nfe {nfe} --seeds 0-63{decoding} --out {out}")


def _introduction(run: "Run", what: str, run_dir: Path) -> Iterator[str]:
    """Yields sentences on what is trained, and where, and the notes."""
    description, world_size = run.describe(), run.engine.world_size
    roles = ", ".join(
        f"{name} ({role['parameters']:,} parameters{'' if role['trained'] else ', frozen'})"
        for name, role in description["roles"].items()
    )
    where = description["device"] if world_size == 1 else f"{world_size} processes, {run.engine.device.type}"
    yield f"Training {what} in {run_dir}, on {where}: {roles}."
    yield from _notes(run)


def _notes(run: "Run") -> Iterator[str]:
    """Yields sentences on what a user might not expect of a run."""
    for idle, names in _untrained(run.describe()["roles"]).items():
        yield f"Not trained, because no loss depends on it: {idle} ({', '.join(names)})."
    yield from (*run.notes, *run.dataset.notes, *run.method.notes())


def _untrained(roles: Mapping[str, Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """Returns the roles in which a parameter is not trained, by its name.

    EDM2's head for the uncertainty of its own training loss is expected there, and is left out.
    """
    untrained: dict[str, list[str]] = {}
    for role, description in roles.items():
        for name in description["unused"]:
            if not name.startswith("network.logvar_linear."):
                untrained.setdefault(name, []).append(role)
    return untrained


def _progress(run: "Run", stack: ExitStack) -> Callable[[int, dict[str, float]], None]:
    """Returns what shows a round in a progress bar, which the stack closes."""
    from edmdistill.progress import progress_bar

    total, bar = run.recipe.training.images, None

    def show(images: int, measures: dict[str, float]) -> None:
        nonlocal bar
        if bar is None:  # at the first round, because a resumed run's first images are not this process's speed
            start = images - run.recipe.training.batch
            bar = stack.enter_context(progress_bar(total, unit="img", unit_scale=True, initial=start))
        losses = {role: measures[f"loss/{role}"] for role in run.optimizers if f"loss/{role}" in measures}
        bar.set_postfix(losses | {name: value for name, value in measures.items() if "/" not in name}, refresh=False)
        bar.update(min(images, total) - bar.n)

    return show


def _fitted(
    memory: float | str | None, recipe: "Recipe", machine: "Machine", **sources: Any
) -> tuple["Machine", tuple[str, ...]]:
    """Returns how the hardware is used with --fit, and a sentence on it.

    Args:
        sources: data, teacher, guide and init.
    """
    if memory is None:
        return machine, ()
    from edmdistill.machine.launch import process_rank
    from edmdistill.planning.fit import fit_run, main_choice
    from edmdistill.progress import stage_bar

    with stage_bar("fitting") as on_progress:
        choose = partial(fit_run, recipe, machine, memory, on_progress, **sources)
        machine, sentence = main_choice(machine, partial(choose, processes=process_rank()[1]))
    return machine, (sentence,)


def _micro_batch(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise TrainingError(f"--micro-batch {text} is not a number of images: use a number, or auto")
    return int(text)
