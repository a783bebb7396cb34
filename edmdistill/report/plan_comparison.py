"""The plan of a run, beside what the run measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec.structs import replace

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.store import build_flow
from edmdistill.errors import counted, duration
from edmdistill.machine.engine import Machine
from edmdistill.machine.environment import machine_of
from edmdistill.machine.gpus import GPUS, UTILIZATION, find_gpu
from edmdistill.networks.flow import FlowNetwork
from edmdistill.planning.plan import Plan, images_per_second, make_plan, measure, split_batch, used
from edmdistill.report.summary import RunSummary


class PlanComparison(NamedTuple):
    """A table of text, whose first row is the head, and notes about it."""

    rows: list[list[str]]
    notes: list[str]


def compare_with_plan(run: RunSummary) -> PlanComparison:
    """Compares memory, operations and time of a run that has a checkpoint, on the machine of its last session."""
    assert run.config is not None
    session: dict[str, Any] = {**run.sessions[-1]} if run.sessions else {}
    notes = [] if session else ["This run has no record of its machine: the plan is for one process, unsharded."]
    training, processes = run.recipe.training, session.get("processes", 1)
    micro_batch = session.get("micro_batch")
    share, rows = split_batch(run.recipe, processes, micro_batch)
    machine = used(machine_of(session)._replace(micro_batch=None), run.recipe, processes, micro_batch)
    plan, guided = _plan(run, run.config, machine, processes)
    if guided:
        notes.append("The guide is assumed to be as large as the teacher, because the run does not record its shape.")
    turns = plan.peaks(rows, rows < share)
    longest = max(turns, key=turns.__getitem__)
    gpu = find_gpu(session.get("device", ""), session.get("device_memory", 0))
    images = run.metrics[-1]["images"] if run.metrics else 0
    speed = images / run.metrics[-1]["seconds"] if run.metrics else None
    used_memory = max((line["memory"] for line in run.metrics if "memory" in line), default=None)
    planned = None
    if gpu is not None:
        precision = training.precision
        planned = images_per_second(plan, GPUS[gpu], precision, UTILIZATION, processes, training.batch, rows)
        notes.append(f"The plan assumes {UTILIZATION:.0%} of the peak throughput of a {gpu}.")
    elif session:
        notes.append("The peak throughput of this machine is unknown, so the plan has no times.")
    if used_memory is not None and gpu is None and session.get("cuda") is None:
        notes.append(
            "On the CPU, memory is the growth of the whole process, including the code of libraries; the plan counts "
            "tensors only."
        )
    table = [
        ["", "plan", "run"],
        ["Peak memory", _bytes(turns[longest]), _bytes(used_memory)],
        ["  weights", _bytes(sum(plan.weights.values())), ""],
        ["  averages", _bytes(plan.averages), ""],
        ["  optimizers", _bytes(plan.optimizer), ""],
        [f"  the {longest}'s turn, {counted(rows, 'image')}", _bytes(sum(plan.turn(longest, rows, rows < share))), ""],
        ["Operations per image", _operations(plan.flops), ""],
        [
            "Operations per second",
            _operations(planned and planned * plan.flops),
            _operations(speed and speed * plan.flops),
        ],
        ["Images per second", _number(planned), _number(speed)],
        [
            "Time for all images",
            *(duration(training.images / rate) if rate else "-" for rate in (planned, speed)),
        ],
    ]
    return PlanComparison(table, notes)


def _plan(run: RunSummary, config: CheckpointConfig, machine: Machine, processes: int) -> tuple[Plan, bool]:
    """Returns the plan, and whether it includes a guide."""
    spec = config.network
    arguments = {name: value for name, value in spec.arguments.items() if name != "guided"}  # the teacher is not
    flow: FlowNetwork = build_flow(replace(spec, arguments=arguments), config.preconditioning, str(run.path))
    guided = any(role.source == "guide" for role in run.recipe.roles.values())
    measured = measure(run.recipe, flow, machine, guide=flow if guided else None)
    return make_plan(measured, machine, processes), guided


def _bytes(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _operations(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e12:,.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:,.3g} GFLOP"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
