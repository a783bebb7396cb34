"""`edmdistill plan`."""

import json
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from edmdistill.cli.options import FiniteFloat, Name
from edmdistill.cli.train import OFFLOADS, Words
from edmdistill.errors import RecipeError
from edmdistill.machine.gpus import GPUS, measure_this_machine
from edmdistill.methods import METHODS

if TYPE_CHECKING:
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.recipes.schema import Recipe

HERE = "this machine"
PRECISIONS = ("fp32", "bf16")
"""Those that differ: fp16 takes what bf16 takes."""


@click.command("plan")
@click.argument("recipe")
@click.argument("teacher", required=False)
@click.option("--method", type=Name(METHODS), help="For a recipe that names none.  [default: the recipe's own]")
@click.option("--guide", metavar="SOURCE", help="As train's; or a published network's name.")
@click.option("--network", metavar="NAME", help="A published network in TEACHER's place, as edm2-img512-s.")
@click.option("--data", help="For a recipe that makes its network: the data that say its shape.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Change the recipe; may be repeated.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Images of one pass.  [default: a process's share]")
@click.option("--shard", is_flag=True, help="As train's.")
@click.option("--offload", type=Words(OFFLOADS), default=(), help="As train's.")
@click.option("--checkpoint-activations", is_flag=True, help="As train's.")
@click.option("--gpu", "names", type=click.Choice(list(GPUS)), multiple=True, help="For this GPU; may be repeated.")
@click.option(
    "--utilisation", type=FiniteFloat(0, 1, min_open=True), default=0.35, show_default=True, help="Of a GPU's peak."
)
@click.option("--all", "all_", is_flag=True, help="Every precision, with and without sharding and checkpointing, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
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
    shard: bool,
    offload: tuple[str, ...],
    checkpoint_activations: bool,
    names: tuple[str, ...],
    utilisation: float,
    all_: bool,
    as_json: bool,
) -> None:
    """Say what training by RECIPE will need, before anything is loaded.

    Of TEACHER the shapes are read, and no weights. Memory is of one GPU; activations are counted on the meta device.
    """
    from msgspec.structs import replace

    from edmdistill.checkpoints.load import outline
    from edmdistill.machine.engine import Machine
    from edmdistill.networks.published import PUBLISHED
    from edmdistill.planning.plan import Plan, images_per_second, make_plan, measure
    from edmdistill.recipes.library import load_recipe

    resolved = load_recipe(recipe, method, sets)
    flow = _flow(resolved, teacher, network, data)
    its_guide = None if guide is None else _published(guide) if guide in PUBLISHED else outline(guide)
    training = resolved.training
    share = -(-training.batch // processes)
    rows = min(micro_batch or share, share)
    accumulates = rows < share
    machine = Machine(shard=shard and processes > 1, offload=offload, checkpointing=checkpoint_activations)
    chosen = {name: GPUS[name] for name in names} if names else {**GPUS, HERE: measure_this_machine()}

    def show(stage: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{stage:60}\r", nl=False, err=True)

    def peaks(plan: Plan) -> dict[str, Any]:
        return {"one_image": plan.peak(1), "micro_batch": plan.peak(rows, accumulates)}

    measured = measure(resolved, flow, machine, show, guide=its_guide)
    plan = make_plan(measured, machine, processes)
    turns = plan.peaks(rows, accumulates)
    longest = max(turns, key=turns.__getitem__)
    gradients, activations = plan.turn(longest, rows, accumulates)
    bytes_ = {f"{role}'s weights": size for role, size in plan.weights.items()} | {
        "averages": plan.averages,
        "optimisers": plan.optimizer,
        "DDP's buckets of gradients": plan.buckets,
        "gathered at one time": plan.gathered,
        f"the {longest}'s gradients": gradients,
        f"the {longest}'s turn with {rows:,} image{'s' if rows > 1 else ''}": activations,
    }
    gpus = []
    for name, gpu in chosen.items():
        half = training.precision != "fp32"
        speed = images_per_second(plan, gpu, half, utilisation, processes, training.batch, rows)
        largest = plan.largest_micro_batch(gpu.memory, share)
        days = training.images / speed / 86400
        gpus.append({"gpu": name, "largest_micro_batch": largest, "images_per_second": speed, "days": days})
    others = []
    for precision, checkpointing in product(PRECISIONS, (False, True)) if all_ else ():
        changed = replace(resolved, training=replace(training, precision=precision))
        show(f"{precision}{', checkpointing' if checkpointing else ''}")
        measured = measure(changed, flow, machine._replace(checkpointing=checkpointing), guide=its_guide)
        for sharded in (False, True) if processes > 1 else (False,):
            other = make_plan(measured, machine._replace(shard=sharded), processes)
            fits = {name: other.largest_micro_batch(gpu.memory, share) for name, gpu in chosen.items()}
            how = {"precision": precision, "checkpointing": checkpointing, "shard": sharded}
            others.append(how | peaks(other) | {"largest_micro_batch": fits})
    show("")
    document = {
        "schema_version": 1,
        "parameters": plan.parameters,
        "bytes": bytes_,
        "peak": peaks(plan) | {"turns": turns},
        "flops_per_image": plan.flops,
        "forward_flops": plan.forward_flops,
        "utilisation": utilisation,
        "gpus": gpus,
        "others": others,
    }
    click.echo(json.dumps(document, indent=2) if as_json else _text(document, resolved, processes, rows))


def _flow(recipe: "Recipe", teacher: str | None, network: str | None, data: str | None) -> "FlowNetwork":
    """The network on the meta device."""
    from edmdistill.checkpoints.load import outline
    from edmdistill.data.datasets import open_dataset
    from edmdistill.networks.published import PUBLISHED
    from edmdistill.training.sources import sketch

    if teacher is not None:
        return outline(teacher)
    if network is not None and network not in PUBLISHED:
        raise RecipeError(
            f"there is no network {network!r}: give one of {', '.join(sorted(PUBLISHED))}, or a checkpoint"
        )
    if network is not None:
        return _published(network)
    if recipe.network is None:
        raise RecipeError("the plan needs the teacher's shape: name a checkpoint, or --network edm2-img512-s")
    if data is None:
        raise RecipeError("this recipe makes its network for the data: name it with --data")
    return sketch(recipe.network, open_dataset(data, split=recipe.data.split))


def _published(name: str) -> "FlowNetwork":
    """A network of PUBLISHED on the meta device."""
    import torch

    from edmdistill.networks import new_network
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.networks.preconditioning import EDM
    from edmdistill.networks.published import PUBLISHED

    kind, shape, arguments = PUBLISHED[name]
    with torch.device("meta"):
        return FlowNetwork(new_network(kind, *shape, **arguments), EDM())


def _bytes(size: float) -> str:
    """A number of bytes, 13 characters wide."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit / 10), (1e3, "kB"))
    return f"{size / unit:10.2f} {name}"


def _text(document: dict[str, Any], recipe: "Recipe", processes: int, rows: int) -> str:
    roles = ", ".join(f"{role} {count / 1e6:,.1f}M" for role, count in document["parameters"].items())
    training, peak = recipe.training, document["peak"]
    lesser = {role: size for role, size in peak["turns"].items() if size < peak["micro_batch"]}
    lines = [
        f"{recipe.method_name} in {training.precision} on {processes} GPU{'s' if processes > 1 else ''}: {roles}.",
        f"{document['flops_per_image'] / 1e9:,.4g} GFLOP an image, {document['forward_flops'] / 1e9:,.4g} of them in a "
        "forward pass.",
        "",
        *(f"{_bytes(size)}  {name}" for name, size in document["bytes"].items() if size),
        f"{_bytes(peak['micro_batch'])}  at most on each GPU, in micro-batches of {rows:,}",
        *(f"{_bytes(size)}  in the {role}'s turn" for role, size in lesser.items()),
        f"{_bytes(peak['one_image'])}  in micro-batches of one image",
        "",
        f"GPU          largest micro-batch    images/s   days for {training.images:,} images, at "
        f"{document['utilisation']:.0%} of its peak",
    ]
    for gpu in document["gpus"]:
        largest = gpu["largest_micro_batch"]
        speed = f"{gpu['images_per_second']:10,.4g}   {gpu['days']:.2g}" if largest else "         -   -"
        lines.append(f"{gpu['gpu']:<12} {largest or 'does not fit':>19}  {speed}")
    if document["others"]:
        names = list(document["others"][0]["largest_micro_batch"])
        lines += ["", "GB in micro-batches of one, and the largest micro-batch by GPU:", ""]
        lines.append(f"{'':34}{'GB':>8}" + "".join(f"{name:>12}" for name in names))
        for other in document["others"]:
            how = "bf16, fp16" if other["precision"] == "bf16" else other["precision"]
            how += ", checkpointing" if other["checkpointing"] else ""
            how += ", sharded" if other["shard"] else ""
            fits = "".join(f"{count or '-':>12}" for count in other["largest_micro_batch"].values())
            lines.append(f"{how:<34}{other['one_image'] / 1e9:8.2g}{fits}")
    return "\n".join(lines)
