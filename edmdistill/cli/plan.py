"""`edmdistill plan`."""

import json
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from edmdistill.cli.train import OFFLOADS, Words
from edmdistill.errors import RecipeError
from edmdistill.training.cards import CARDS

if TYPE_CHECKING:
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.recipes import Recipe

PRECISIONS = ("fp32", "bf16")
"""Those that differ: fp16 takes what bf16 takes."""


@click.command("plan")
@click.argument("recipe")
@click.argument("teacher", required=False)
@click.option("--guide", metavar="SOURCE", help="As train's; or a published network's name.")
@click.option("--network", metavar="NAME", help="A published network in TEACHER's place, as edm2-img512-s.")
@click.option("--data", help="For a recipe that makes its network: the data that say its shape.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Change the recipe; may be repeated.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Images of one pass.  [default: a process's share]")
@click.option("--shard", is_flag=True, help="As train's.")
@click.option("--offload", type=Words(OFFLOADS), default=(), help="As train's.")
@click.option("--checkpoint-activations", is_flag=True, help="As train's.")
@click.option("--card", "names", type=click.Choice(list(CARDS)), multiple=True, help="For this GPU; may be repeated.")
@click.option("--utilisation", type=click.FloatRange(0, 1), default=0.35, show_default=True, help="Of a GPU's peak.")
@click.option("--all", "all_", is_flag=True, help="Every precision, with and without sharding and checkpointing, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    recipe: str,
    teacher: str | None,
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

    from edmdistill.checkpoints.convert import outline
    from edmdistill.networks.sizes import SIZES
    from edmdistill.recipes import load_recipe
    from edmdistill.training.engine import Machine
    from edmdistill.training.plan import Plan, images_per_second, make_plan, measure

    resolved = load_recipe(recipe, None, sets)
    flow = _flow(resolved, teacher, network, data)
    its_guide = None if guide is None else _published(guide) if guide in SIZES else outline(guide)
    training = resolved.training
    share = -(-training.batch // processes)
    rows = min(micro_batch or share, share)
    accumulates = rows < share
    machine = Machine(shard=shard and processes > 1, offload=offload, checkpointing=checkpoint_activations)
    chosen = {name: CARDS[name] for name in names or CARDS}

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
    cards = []
    for name, card in chosen.items():
        speed = images_per_second(plan, card, training.precision != "fp32", utilisation, processes)
        largest = plan.largest_micro_batch(card.memory, share)
        days = training.images / speed / 86400
        cards.append({"card": name, "largest_micro_batch": largest, "images_per_second": speed, "days": days})
    others = []
    for precision, checkpointing in product(PRECISIONS, (False, True)) if all_ else ():
        changed = replace(resolved, training=replace(training, precision=precision))
        show(f"{precision}{', checkpointing' if checkpointing else ''}")
        measured = measure(changed, flow, machine._replace(checkpointing=checkpointing), guide=its_guide)
        for sharded in (False, True) if processes > 1 else (False,):
            other = make_plan(measured, machine._replace(shard=sharded), processes)
            fits = {name: other.largest_micro_batch(card.memory, share) for name, card in chosen.items()}
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
        "cards": cards,
        "others": others,
    }
    click.echo(json.dumps(document, indent=2) if as_json else _text(document, resolved, processes, rows))


def _flow(recipe: "Recipe", teacher: str | None, network: str | None, data: str | None) -> "FlowNetwork":
    """The network on the meta device."""
    import torch

    from edmdistill.checkpoints.convert import outline
    from edmdistill.data.datasets import open_dataset
    from edmdistill.networks import new_network
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.networks.preconditioning import EDM
    from edmdistill.networks.sizes import SIZES

    if teacher is not None:
        return outline(teacher)
    if network is not None and network not in SIZES:
        raise RecipeError(f"there is no network {network!r}: give one of {', '.join(sorted(SIZES))}, or a checkpoint")
    if network is not None:
        return _published(network)
    if recipe.network is None:
        raise RecipeError("the plan needs the teacher's shape: name a checkpoint, or --network edm2-img512-s")
    if data is None:
        raise RecipeError("this recipe makes its network for the data: name them by --data")
    found, own = open_dataset(data, split=recipe.data.split), recipe.network
    with torch.device("meta"):
        made = new_network(own.kind, found.img_resolution, found.img_channels, found.label_dim, **own.arguments)
    return FlowNetwork(made, EDM(sigma_data=own.sigma_data))


def _published(name: str) -> "FlowNetwork":
    """A network of SIZES on the meta device."""
    import torch

    from edmdistill.networks import new_network
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.networks.preconditioning import EDM
    from edmdistill.networks.sizes import SIZES

    kind, shape, arguments = SIZES[name]
    with torch.device("meta"):
        return FlowNetwork(new_network(kind, *shape, **arguments), EDM())


def _text(document: dict[str, Any], recipe: "Recipe", processes: int, rows: int) -> str:
    roles = ", ".join(f"{role} {count / 1e6:,.1f}M" for role, count in document["parameters"].items())
    training, peak = recipe.training, document["peak"]
    lesser = {role: size for role, size in peak["turns"].items() if size < peak["micro_batch"]}
    lines = [
        f"{recipe.method['name']} in {training.precision} on {processes} GPU{'s' if processes > 1 else ''}: {roles}.",
        f"{document['flops_per_image'] / 1e9:,.4g} GFLOP an image, {document['forward_flops'] / 1e9:,.4g} of them in a "
        "forward pass.",
        "",
        *(f"{size / 1e9:10.2f} GB  {name}" for name, size in document["bytes"].items() if size),
        f"{peak['micro_batch'] / 1e9:10.2f} GB  at most on each GPU, in micro-batches of {rows:,}",
        *(f"{size / 1e9:10.2f} GB  in the {role}'s turn" for role, size in lesser.items()),
        f"{peak['one_image'] / 1e9:10.2f} GB  in micro-batches of one image",
        "",
        f"GPU          largest micro-batch    images/s   days for {training.images:,} images, at "
        f"{document['utilisation']:.0%} of its peak",
    ]
    for card in document["cards"]:
        largest = card["largest_micro_batch"]
        speed = f"{card['images_per_second']:10,.0f}   {card['days']:.1f}" if largest else "         -   -"
        lines.append(f"{card['card']:<12} {largest or 'does not fit':>19}  {speed}")
    if document["others"]:
        names = list(document["others"][0]["largest_micro_batch"])
        lines += ["", "GB in micro-batches of one, and the largest micro-batch by GPU:", ""]
        lines.append(f"{'':34}{'GB':>8}" + "".join(f"{name:>12}" for name in names))
        for other in document["others"]:
            how = "bf16, fp16" if other["precision"] == "bf16" else other["precision"]
            how += ", checkpointing" if other["checkpointing"] else ""
            how += ", sharded" if other["shard"] else ""
            fits = "".join(f"{count or '-':>12}" for count in other["largest_micro_batch"].values())
            lines.append(f"{how:<34}{other['one_image'] / 1e9:8.1f}{fits}")
    return "\n".join(lines)
