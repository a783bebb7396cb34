"""`--fit`: the fastest way to use a GPU's memory for a run.

Ways differ in the micro-batch, in what is recomputed, in the pieces of the generator's loss, in what waits in the
host's memory, and in the precision of Adam's second moment. None of them changes what is computed, beyond rounding;
that of the second moment is coarse, and is chosen where it saves much time, or nothing else fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

import torch

from edmdistill.checkpoints.load import outline
from edmdistill.errors import TrainingError
from edmdistill.machine.compile import CUDA_GRAPHS
from edmdistill.machine.devices import pick_device
from edmdistill.machine.engine import Engine, Machine
from edmdistill.machine.gpu_options import require_gpu
from edmdistill.machine.gpus import GPU, HERE, UTILIZATION, measure_this_machine
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import drop_second_time
from edmdistill.planning.document import PlanRequest
from edmdistill.planning.outlines import outline_guide, outline_teacher
from edmdistill.planning.plan import Measurement, Plan, images_per_second, make_plan, measure, split_batch, used
from edmdistill.recipes.schema import Recipe
from edmdistill.training.checks import compile_mode
from edmdistill.training.ema import profiles
from edmdistill.training.micro_batch import HEADROOM, fewest_fit
from edmdistill.training.sources import no_teacher, starts_from_init
from edmdistill.transfer import is_gpu

PARTS = "ema", "teacher", "optimizer"
"""What can wait in the host's memory."""
CONTEXT = 0.6e9
"""Bytes of a GPU that CUDA takes before the first tensor: on a small one, all of the headroom. Not measured."""
PIECES = 4
"""Pieces of the generator's loss that are tried: more take launches, and save little."""
HOST_SPEED = 20e9
"""Bytes a second between a GPU and pinned memory, over PCIe 4.0 x16 of 32e9; and those of a host's own memory."""
EMA_TRAFFIC = 4
"""Times that an average's bytes are moved in a round: weights down, then two numbers read and one written."""
ADAM_TRAFFIC = 10
"""The same of the bytes of weights that the host's Adam trains: weights and gradients down, weights up, 7 in a step."""
COARSE = 1.1
"""Times that a round takes longer at least without a second moment in bfloat16, where that is chosen."""


class Fitted(NamedTuple):
    """A way to use the memory.

    Attributes:
        machine: with a number as its micro-batch.
        memory, peak: bytes that each GPU has, and that are taken.
        seconds: of a round, estimated.
    """

    machine: Machine
    memory: float
    peak: int
    seconds: float

    @property
    def sentence(self) -> str:
        """Returns what was chosen, in words."""
        chosen = f"{options(self.machine)}, by plan {self.peak / 1e9:.3g} of {self.memory / 1e9:.4g} GB"
        coarse = self.machine.second_moment == "bf16"
        return f"--fit chooses {chosen}{'; the second moment is rounded at random, without bias' if coarse else ''}."

    def describe(self) -> dict[str, Any]:
        """Returns what was chosen, as plain values."""
        machine = self.machine
        return {
            "options": options(machine),
            "micro_batch": machine.micro_batch,
            "checkpointing": machine.checkpointing,
            "loss_pieces": machine.loss_pieces,
            "second_moment": machine.second_moment,
            "offload": list(machine.offload),
            "memory": self.memory,
            "peak": self.peak,
            "seconds_per_round": self.seconds,
        }


def options(machine: Machine) -> str:
    """Returns the options of the command line that ask for this use of a machine."""
    words = {
        "--checkpoint-activations": machine.checkpointing,
        f"--loss-pieces {machine.loss_pieces}": machine.loss_pieces > 1,
        f"--second-moment {machine.second_moment}": machine.second_moment != "fp32",
        f"--compile {machine.compile}": machine.compile not in (None, "off"),
        "--shard": machine.shard,
        f"--offload {','.join(machine.offload)}": machine.offload,
        f"--micro-batch {machine.micro_batch}": machine.micro_batch,
    }
    return " ".join(word for word, asked in words.items() if asked)


def fit(
    recipe: Recipe,
    flow: FlowNetwork,
    machine: Machine,
    memory: float,
    gpu: GPU,
    *,
    guide: FlowNetwork | None = None,
    processes: int = 1,
    spill: bool = True,
    utilization: float = UTILIZATION,
    on_progress: Callable[[str], object] = lambda stage: None,
) -> Fitted:
    """Returns the fastest way that fits.

    Args:
        flow, guide: as for `measure`.
        machine: what it asks for stays, but for pieces of a loss that a micro-batch does not have.
        memory: bytes of one GPU.
        gpu: gives the speed.
        spill: whether the host has memory of its own to which the run may move things.
        utilization: share of the GPU's peak speed, in (0, 1].
        on_progress: gets what is being measured.
    Raises: TrainingError: nothing fits; or CUDA graphs are asked for, whose memory is not known.
    """
    if machine.micro_batch == "auto":
        raise TrainingError("--fit chooses the micro-batch itself: leave out --micro-batch auto")
    if (mode := compile_mode(recipe, machine)) in CUDA_GRAPHS:
        raise TrainingError(
            f"--fit does not know the memory of CUDA graphs, which --compile {mode} makes: give --micro-batch and what "
            "else saves memory yourself, or use --compile default"
        )
    fitting, least, share = [], math.inf, split_batch(recipe, processes, None)[0]
    tried = list(ways(recipe, machine, spill))
    for way in tried:
        on_progress(options(way))
        measured = measure(recipe, flow, way, guide=guide)
        for chosen in spilled(recipe, way, spill):
            plan = make_plan(measured, chosen, processes)
            fitted = _fitted(measured, plan, chosen, memory, gpu, processes, utilization)
            if (run := _as_run(way, recipe, processes, fitted)) != way:  # the plan has smaller pieces
                tried += [run] if run not in tried else []
                continue
            least = min(least, plan.peak(plan.group_size))
            if fitted is not None and chosen == machine and fitted.machine.micro_batch == share:
                return fitted  # nothing is faster than to do nothing
            fitting += [] if fitted is None else [fitted]
    if fitting:
        exact = machine.second_moment
        return min(fitting, key=lambda way: way.seconds * (1 if way.machine.second_moment == exact else COARSE))
    raise TrainingError(
        f"not even {fewest_fit(recipe.group_size)} in {memory / 1e9:.4g} GB: the leanest way takes "
        f"{least / 1e9:.4g} GB; use a larger GPU, or several with --processes and --shard"
    )


def _as_run(way: Machine, recipe: Recipe, processes: int, fitted: Fitted | None) -> Machine:
    """Returns a way with the pieces of a loss that its micro-batches have; None: in the smallest ones."""
    if fitted is None:
        return way._replace(loss_pieces=min(way.loss_pieces, recipe.group_size))
    assert fitted.machine.micro_batch != "auto"
    return used(way, recipe, processes, fitted.machine.micro_batch)


def ways(recipe: Recipe, machine: Machine, spill: bool) -> Iterator[Machine]:
    """Yields the ways whose passes differ, that of `machine` first.

    A teacher in the host's memory saves none without checkpointing: autograd holds its weights for the backward pass.
    """
    splits = recipe.method_class.splits_loss and machine.loss_pieces == 1
    can_offload = spill and "teacher" not in machine.offload and any(role.frozen for role in recipe.roles.values())
    for checkpointing, pieces in product(
        (True,) if machine.checkpointing else (False, True), (1, PIECES) if splits else (machine.loss_pieces,)
    ):
        way = machine._replace(checkpointing=checkpointing, loss_pieces=pieces)
        yield way
        if can_offload and checkpointing:
            yield way._replace(offload=(*way.offload, "teacher"))


def spilled(recipe: Recipe, way: Machine, spill: bool) -> Iterator[Machine]:
    """Yields the way, and those that keep averages or optimizers in the host's memory too, or half a second moment."""
    adam = recipe.training.optimizer == "adam"
    parts = {"ema": True, "optimizer": adam}
    movable = [part for part, can_move in parts.items() if spill and can_move and part not in way.offload]
    for count in range(len(movable) + 1):
        for more in combinations(movable, count):
            chosen = way._replace(offload=(*way.offload, *more))
            yield chosen
            if adam and "optimizer" not in chosen.offload and chosen.second_moment == "fp32":
                yield chosen._replace(second_moment="bf16")


def _fitted(
    measured: Measurement, plan: Plan, machine: Machine, memory: float, gpu: GPU, processes: int, utilization: float
) -> Fitted | None:
    """Returns a way with the largest micro-batch that fits; None: not even one image does."""
    training, group = measured.recipe.training, plan.group_size
    assert machine.micro_batch != "auto"
    share, rows = split_batch(measured.recipe, processes, machine.micro_batch)
    room = memory * (1 - HEADROOM)
    if machine.micro_batch is None and plan.peak(share, accumulates=False) > room:
        rows = plan.largest_micro_batch(memory, share)
    count = -(-share // max(rows, group))
    rows = -(-share // group // count) * group
    peak = plan.peak(rows, accumulates=count > 1)
    if peak > room or count > training.batch // group // processes:
        return None
    speed = images_per_second(plan, gpu, training.precision, utilization, processes, training.batch, rows)
    seconds = training.batch / speed + _traffic(measured, machine, count) / HOST_SPEED
    return Fitted(machine._replace(micro_batch=rows), memory, peak, seconds)


def _traffic(measured: Measurement, machine: Machine, micro_batches: int) -> float:
    """Returns the bytes that a round moves because of what is in the host's memory."""
    recipe, traffic = measured.recipe, measured.loaded * micro_batches
    if "ema" in machine.offload:
        average = sum(tensor.nbytes for tensor in measured.networks[recipe.method_class.product].state_dict().values())
        traffic += EMA_TRAFFIC * average * len(profiles(recipe.ema))
    if "optimizer" in machine.offload:
        traffic += ADAM_TRAFFIC * sum(turn.trained for turn in measured.passes.values())
    return traffic


def fit_run(
    recipe: Recipe,
    machine: Machine,
    memory: float | str,
    on_progress: Callable[[str], object] = lambda stage: None,
    *,
    data: str,
    teacher: str | None,
    guide: str | None,
    init: str | None = None,
    processes: int,
) -> Fitted:
    """Returns the fastest way to train on this machine.

    Args:
        memory: bytes, or "auto": what the GPU has beside CUDA's context.
        data, teacher, guide, init: as for `prepare`.
    Raises: TrainingError: nothing fits; there is no GPU, and no memory was named; or no teacher.
    """
    device = pick_device(machine.device)  # the current one, whose speed is measured
    if isinstance(memory, str):
        require_gpu(device, "--fit auto")
        memory = torch.cuda.get_device_properties(device).total_memory - CONTEXT
    if teacher is None and init is not None and starts_from_init(recipe):
        flow = drop_second_time(outline(init))
    elif teacher is None and recipe.network is None:
        raise no_teacher(recipe)
    else:
        flow = outline_teacher(recipe, teacher, None, data if teacher is None else None)
    return fit(
        recipe,
        flow,
        machine,
        memory,
        measure_this_machine(),
        guide=outline_guide(guide),
        processes=processes,
        spill=is_gpu(device) and not machine.shard,
        on_progress=on_progress,
    )


def main_choice(machine: Machine, choose: Callable[[], Fitted]) -> tuple[Machine, str]:
    """Returns the way that the main process of several chooses, and its sentence, "" on the others.

    All processes call it together. Each would measure another speed, and might choose another way.

    Args:
        choose: a call of `fit_run`.
    Raises: PeerFailed: on the others, where `choose` raises.
    """
    engine = Engine(Machine(machine.device))
    fitted = engine.on_main(choose)
    way = machine if fitted is None else fitted.machine
    numbers = way.micro_batch if isinstance(way.micro_batch, int) else 0, way.loss_pieces
    flags = way.checkpointing, way.second_moment == "bf16", *(part in way.offload for part in PARTS)
    size, pieces, checkpointing, coarse, *moved = map(engine.broadcast, (*numbers, *flags))
    agreed = machine._replace(
        micro_batch=size,
        checkpointing=bool(checkpointing),
        loss_pieces=pieces,
        second_moment="bf16" if coarse else "fp32",
        offload=tuple(part for part, is_moved in zip(PARTS, moved, strict=True) if is_moved),
        planned=True,
    )
    return agreed, "" if fitted is None else fitted.sentence


def fit_request(
    request: PlanRequest, memory: float | str, on_progress: Callable[[str], object]
) -> tuple[PlanRequest, Fitted]:
    """Returns the request for the fastest way that fits, and the way.

    Args:
        memory: bytes, or "auto": those of the GPU; where all are listed, what this machine's has beside CUDA's context.
    Raises: TrainingError: nothing fits; or it is this machine's GPU that is meant, and there is none.
    """
    name = HERE if HERE in request.gpus else next(iter(request.gpus))
    gpu = request.gpus[name]
    if isinstance(memory, str):
        memory = gpu.memory
        if name == HERE:
            require_gpu(pick_device(None), "--fit auto")
            memory -= CONTEXT
    fitted = fit(
        request.recipe,
        request.flow,
        request.machine._replace(micro_batch=request.micro_batch),
        memory,
        gpu,
        guide=request.guide,
        processes=request.processes,
        spill=not request.machine.shard,
        utilization=request.utilization,
        on_progress=on_progress,
    )
    size = fitted.machine.micro_batch
    assert size != "auto"
    return request._replace(machine=fitted.machine, micro_batch=size), fitted
