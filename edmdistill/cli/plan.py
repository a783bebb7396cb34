"""`edmdistill plan`: what a run will need, before anything is loaded."""

import json

import click

from edmdistill.cli.machine_options import MachineOptions, machine_options
from edmdistill.cli.options import json_option, sets_option
from edmdistill.cli.types import Count, FiniteFloat, Memory, Name
from edmdistill.machine.gpus import GPUS, HERE, UTILIZATION, measure_this_machine
from edmdistill.methods import METHODS


@click.command("plan")
@click.argument("recipe")
@click.argument("teacher", required=False)
@click.option("--method", type=Name(METHODS), help="Method of a recipe that names none.  [default: the recipe's own]")
@click.option("--guide", metavar="SOURCE", help="As for train; or the name of a published network.")
@click.option("--network", metavar="NAME", help="A published network in place of TEACHER, as edm2-img512-s.")
@click.option("--data", metavar="DATA", help="For a recipe that makes its network: the data that it is made for.")
@sets_option
@click.option("--processes", type=Count(min=1), default=1, show_default=True, help="Number of GPUs.")
@click.option("--micro-batch", type=Count(min=1), help="Images of one forward pass.  [default: the share of a process]")
@click.option("--fit", type=Memory(), help="As for train; auto: the one --gpu, or this machine's.")
@machine_options(short=True)
@click.option(
    "--gpu", "names", type=click.Choice(list(GPUS)), multiple=True, help="Plan for this GPU; may be repeated."
)
@click.option(
    "--utilization",
    type=FiniteFloat(0, 1, min_open=True),
    default=UTILIZATION,
    show_default=True,
    help="Share of a GPU's peak speed; train --fit takes the default.",
)
@click.option(
    "--all", "all_", is_flag=True, help="Plan every precision, with and without sharding and checkpointing, too."
)
@json_option
def command(
    recipe: str,
    teacher: str | None,
    method: str | None,
    guide: str | None,
    network: str | None,
    data: str | None,
    sets: tuple[str, ...],
    processes: int,
    micro_batch: int | None,
    options: MachineOptions,
    fit: float | str | None,
    names: tuple[str, ...],
    utilization: float,
    all_: bool,
    as_json: bool,
) -> None:
    """Say what training by RECIPE will need, before anything is loaded.

    Only the shapes of TEACHER are read, not its weights. Memory is that of one GPU; activations are counted on the meta
    device.
    """
    from edmdistill.planning.document import PlanRequest, plan_document, plan_text
    from edmdistill.planning.fit import fit_request
    from edmdistill.planning.outlines import outline_guide, outline_teacher
    from edmdistill.progress import stage_bar
    from edmdistill.recipes.library import load_recipe
    from edmdistill.training.checks import require_options

    if options.shard and processes == 1:
        raise click.UsageError("--shard needs several processes: add --processes N.")
    if fit is not None and len(names) > 1:
        raise click.UsageError("--fit chooses for one GPU: give one --gpu, or none for this machine's.")
    resolved = load_recipe(recipe, method, sets)
    machine = options.machine()
    require_options(resolved, machine)
    request = PlanRequest(
        resolved,
        outline_teacher(resolved, teacher, network, data),
        outline_guide(guide),
        machine,
        processes,
        micro_batch,
        {name: GPUS[name] for name in names} if names else {**GPUS, HERE: measure_this_machine()},
        utilization,
    )
    fitted = None
    if fit is not None:
        with stage_bar("fitting") as on_progress:
            request, fitted = fit_request(request, fit, on_progress)
        click.echo(fitted.sentence, err=as_json)
    with stage_bar("planning") as on_progress:
        document = plan_document(request, on_progress, all_) | {"fit": fitted and fitted.describe()}
    click.echo(json.dumps(document, indent=2) if as_json else plan_text(document, request))
