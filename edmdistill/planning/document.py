"""The plan of a run as a document, for JSON, and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

from msgspec.structs import replace

from edmdistill.errors import counted, duration
from edmdistill.machine.compile import CUDA_GRAPHS
from edmdistill.machine.engine import Machine
from edmdistill.machine.gpus import GPU
from edmdistill.networks.flow import FlowNetwork
from edmdistill.planning.plan import Plan, images_per_second, make_plan, measure, split_batch, used
from edmdistill.recipes.schema import Recipe
from edmdistill.training.checks import compile_mode

PRECISIONS = ("fp32", "bf16")
"""Precisions of different memory: fp16 takes as much as bf16, tf32 as fp32."""


class PlanRequest(NamedTuple):
    """The plan of a run.

    Attributes:
        flow: the teacher, or the network that the recipe makes; on the meta device.
        guide: the network that guides the teacher, if the recipe needs one.
        processes: number of GPUs.
        micro_batch: as asked; None: a process's share of the batch.
        gpus: by name.
        utilization: share of a GPU's peak, in (0, 1].
    """

    recipe: Recipe
    flow: FlowNetwork
    guide: FlowNetwork | None
    machine: Machine
    processes: int
    micro_batch: int | None
    gpus: Mapping[str, GPU]
    utilization: float

    @property
    def graphs(self) -> bool:
        """Returns whether CUDA graphs are made."""
        return compile_mode(self.recipe, self.machine) in CUDA_GRAPHS

    @property
    def used(self) -> Machine:
        """Returns the machine as the run uses it."""
        return used(self.machine, self.recipe, self.processes, self.micro_batch)

    @property
    def rows(self) -> int:
        """Images of one micro-batch."""
        return split_batch(self.recipe, self.processes, self.micro_batch)[1]


def plan_document(request: PlanRequest, on_progress: Callable[[str], object], alternatives: bool) -> dict[str, Any]:
    """Returns memory, operations and time of a run, as plain values.

    Args:
        on_progress: gets what is being measured.
        alternatives: plans every precision, with and without sharding and checkpointing, too.
    """
    training, rows = request.recipe.training, request.rows
    share, _ = split_batch(request.recipe, request.processes, None)
    machine = request.used
    measurement = measure(request.recipe, request.flow, machine, on_progress, guide=request.guide)
    plan = make_plan(measurement, machine, request.processes)
    turns = plan.peaks(rows, rows < share)
    gpus = []
    for name, gpu in request.gpus.items():
        use = request.utilization, request.processes, training.batch, rows
        speed = images_per_second(plan, gpu, training.precision, *use)
        largest = plan.largest_micro_batch(gpu.memory, share)
        days = training.images / speed / 86400
        gpus.append({"gpu": name, "largest_micro_batch": largest, "images_per_second": speed, "days": days})
        if training.precision == "fp32":
            gpus[-1]["days_in_tf32"] = days * speed / images_per_second(plan, gpu, "tf32", *use)
    return {
        "schema_version": 1,
        "parameters": plan.parameters,
        "bytes": _bytes_by_purpose(plan, turns, rows, rows < share),
        "peak": _peaks(plan, rows, share) | {"turns": turns},
        "cuda_graphs": plan.graphs(rows, -(-share // rows)) if request.graphs else None,
        "flops_per_image": plan.flops,
        "forward_flops": plan.forward_flops,
        "utilization": request.utilization,
        "gpus": gpus,
        "others": _alternatives(request, on_progress) if alternatives else [],
    }


def _alternatives(request: PlanRequest, on_progress: Callable[[str], object]) -> list[dict[str, Any]]:
    recipe, processes, rows = request.recipe, request.processes, request.rows
    share, _ = split_batch(recipe, processes, None)
    shardable = processes > 1 and not request.machine.offload and recipe.training.optimizer != "adam8bit"
    plans = []
    for precision, checkpointing in product(PRECISIONS, (False, True)):
        on_progress(f"{precision}{', checkpointing' if checkpointing else ''}")
        changed = replace(recipe, training=replace(recipe.training, precision=precision))
        for shard in (False, True) if shardable else (False,):
            machine = request.used._replace(checkpointing=checkpointing, shard=shard)
            plan = make_plan(measure(changed, request.flow, machine, guide=request.guide), machine, processes)
            fits = {name: plan.largest_micro_batch(gpu.memory, share) for name, gpu in request.gpus.items()}
            options = {"precision": precision, "checkpointing": checkpointing, "shard": shard}
            plans.append(options | _peaks(plan, rows, share) | {"largest_micro_batch": fits})
    return plans


def _peaks(plan: Plan, rows: int, share: int) -> dict[str, Any]:
    return {"one_image": plan.peak(plan.group_size), "micro_batch": plan.peak(rows, rows < share)}


def _bytes_by_purpose(plan: Plan, turns: Mapping[str, int], rows: int, accumulates: bool) -> dict[str, int]:
    """Returns what adds up to the peak."""
    largest = max(turns, key=turns.__getitem__)
    gradients, activations = plan.turn(largest, rows, accumulates)
    return {f"{role}'s weights": size for role, size in plan.weights.items()} | {
        "averages": plan.averages,
        "optimizers": plan.optimizer,
        "DDP's buckets of gradients": plan.buckets,
        "gathered at one time": plan.gathered,
        f"the {largest}'s gradients": gradients,
        f"the {largest}'s turn with {counted(rows, 'image')}": activations,
    }


def plan_text(document: Mapping[str, Any], request: PlanRequest) -> str:
    """Returns a plan's document as text."""
    roles = ", ".join(f"{role} {count / 1e6:,.1f}M" for role, count in document["parameters"].items())
    training, peak, processes = request.recipe.training, document["peak"], request.processes
    smaller = {role: size for role, size in peak["turns"].items() if size < peak["micro_batch"]}
    lines = [
        f"{request.recipe.method_name} in {training.precision} on {counted(processes, 'GPU')}: {roles}.",
        f"{document['flops_per_image'] / 1e9:,.4g} GFLOP an image, {document['forward_flops'] / 1e9:,.4g} of them in a "
        "forward pass.",
        "",
        *(f"{_size(size)}  {name}" for name, size in document["bytes"].items() if size),
        f"{_size(peak['micro_batch'])}  at most on each GPU, in micro-batches of {request.rows:,}",
        *(f"{_size(size)}  in the {role}'s turn" for role, size in smaller.items()),
        f"{_size(peak['one_image'])}  in micro-batches of {_fewest(request.recipe)}",
        *_graphs_text(document["cuda_graphs"]),
        "",
        f"GPU          largest micro-batch    images/s   time for {counted(training.images, 'image')}, at "
        f"{document['utilization']:.0%} of its peak",
    ]
    for gpu in document["gpus"]:
        largest = gpu["largest_micro_batch"]
        time, sooner = (86400 * days for days in (gpu["days"], gpu.get("days_in_tf32", gpu["days"])))
        speed = f"{gpu['images_per_second']:10,.4g}   {duration(time)}" if largest else "         -   -"
        tf32 = f"; {duration(sooner)} with --set training.precision=tf32" if largest and sooner < 0.9 * time else ""
        lines.append(f"{gpu['gpu']:<12} {largest or 'does not fit':>19}  {speed}{tf32}")
    return "\n".join([*lines, *_alternatives_text(document["others"], _fewest(request.recipe))])


def _fewest(recipe: Recipe) -> str:
    """Returns the smallest micro-batch, in words."""
    return "one image" if recipe.group_size == 1 else f"{recipe.group_size} images"


def _graphs_text(size: int | None) -> list[str]:
    """Returns what is not in the plan."""
    if size is None:
        return []
    return [f"{_size(size)}  more for CUDA graphs, and copies of their inputs: not counted, as no GPU has shown it"]


def _alternatives_text(others: list[dict[str, Any]], fewest: str) -> list[str]:
    if not others:
        return []
    names = list(others[0]["largest_micro_batch"])
    lines = ["", f"GB in micro-batches of {fewest}, and the largest micro-batch by GPU:", ""]
    lines.append(f"{'':34}{'GB':>8}" + "".join(f"{name:>12}" for name in names))
    for other in others:
        options = "bf16, fp16" if other["precision"] == "bf16" else "fp32, tf32"
        options += ", checkpointing" if other["checkpointing"] else ""
        options += ", sharded" if other["shard"] else ""
        fits = "".join(f"{count or '-':>12}" for count in other["largest_micro_batch"].values())
        lines.append(f"{options:<34}{other['one_image'] / 1e9:8.2g}{fits}")
    return lines


def _size(size: float) -> str:
    """Returns a number of bytes, 13 characters wide."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit / 10), (1e3, "kB"))
    return f"{size / unit:10.2f} {name}"
