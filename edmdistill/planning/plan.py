"""Estimates a run before anything is loaded: bytes by purpose, operations, and time.

Every turn of the method is taken on the meta device, where tensors have shapes and no numbers. Live bytes are counted
there, so that activations are what autograd keeps, not a formula. Two sizes of a micro-batch determine all others.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from edmdistill.machine.engine import Machine, split_rows
from edmdistill.machine.gpus import GPU
from edmdistill.methods.base import NoiseRange, Turn
from edmdistill.methods.pieces import Pieces
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.magnitude import EffectiveWeights
from edmdistill.planning.envelope import Uneven, peak, uneven_lines
from edmdistill.planning.ledger import Ledger, fused_attention
from edmdistill.recipes.schema import Recipe
from edmdistill.training.checks import require_guide
from edmdistill.training.ema import profiles
from edmdistill.training.meta import cached_passes
from edmdistill.training.micro_batch import HEADROOM
from edmdistill.training.optimizers import state_bytes
from edmdistill.training.probe import ROWS, Probe
from edmdistill.training.roles import build_roles, effective_weights, shared_weights


class Pass(NamedTuple):
    """A forward and a backward pass of one turn.

    Attributes:
        trained: bytes of the weights that the turn trains.
        total: with the gradients of these weights.
        activations: without them.
    """

    trained: int
    total: Uneven
    activations: Uneven


class Plan(NamedTuple):
    """The needs of one process.

    Attributes:
        parameters: numbers of parameters, by role.
        weights: bytes that are always allocated, by role.
        gradients: bytes of the gradients of a turn, by role.
        passes: by role.
        averages, optimizer: bytes that are always allocated.
        buckets: bytes of DDP's buckets, which hold the gradients of all trained roles.
        gathered: bytes of what FSDP2 has unsharded at one time.
        sharded: whether FSDP2 shards the above.
        flops: operations of one round for an image, forward and backward, with recomputation.
        forward_flops: of one pass of the product's network.
        calls: of torch in one round, with one micro-batch a turn.
        group_size: images that stay together in a micro-batch.
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    gradients: dict[str, int]
    passes: dict[str, Pass]
    averages: int
    optimizer: int
    buckets: int
    gathered: int
    sharded: bool
    flops: float
    forward_flops: float
    calls: int
    group_size: int

    @property
    def resident(self) -> int:
        """Bytes between two turns."""
        return sum(self.weights.values()) + self.averages + self.optimizer + self.buckets + self.gathered

    def turn(self, role: str, micro_batch: int, accumulates: bool = True) -> tuple[int, int]:
        """Returns the bytes of gradients, and the peak of all else in a turn's pass.

        Gradients that are allocated by the pass itself, or are in DDP's buckets, are not counted apart.

        Args:
            accumulates: whether the pass is one of several, so that gradients exist before it. DDP moves them into its
                buckets after the last.
        """
        turn = self.passes[role]
        if accumulates or self.sharded:
            return self.gradients[role], peak(turn.activations, micro_batch)
        return 0, peak(turn.activations if self.buckets else turn.total, micro_batch)

    def graphs(self, micro_batch: int, count: int) -> int:
        """Returns the bytes that CUDA graphs hold beside the peak: all that the passes of the largest turn allocate.

        Copies of their inputs, weights among them, are not included.

        Args:
            count: of micro-batches in a turn.
        """
        return count * max(peak(turn.activations, micro_batch) for turn in self.passes.values())

    def peaks(self, micro_batch: int, accumulates: bool = True) -> dict[str, int]:
        """Returns the peak of every turn in bytes, by role."""
        return {role: self.resident + sum(self.turn(role, micro_batch, accumulates)) for role in self.passes}

    def peak(self, micro_batch: int, accumulates: bool = True) -> int:
        """Returns the peak in bytes."""
        return max(self.peaks(micro_batch, accumulates).values())

    def largest_micro_batch(self, memory: float, most: int) -> int:
        """Returns the largest micro-batch, `most` at most, of several that fits into so many bytes; 0: not even one."""
        sizes = range(self.group_size, most + 1, self.group_size)
        return bisect_right(sizes, memory * (1 - HEADROOM), key=self.peak) * self.group_size


class Measurement(NamedTuple):
    """A round on the meta device; the attributes are those of Plan, before the machine is known.

    Attributes:
        loaded: bytes of offloaded weights that go to the device in a round, with one micro-batch a turn.
    """

    recipe: Recipe
    networks: dict[str, nn.Module]
    passes: dict[str, Pass]
    offloaded: bool
    flops: float
    forward_flops: float
    calls: int
    loaded: int = 0


def measure(
    recipe: Recipe,
    flow: FlowNetwork,
    machine: Machine = Machine(),
    on_progress: Callable[[str], object] = lambda stage: None,
    *,
    guide: FlowNetwork | None = None,
) -> Measurement:
    """Returns what every turn of a recipe takes on the meta device.

    Args:
        flow: the teacher, or the network that a method without one makes; on any device, because only shapes matter.
        machine: checkpointing, sharding, the pieces of the loss and an offloaded teacher change a pass; `make_plan`
            handles the rest.
        on_progress: gets the name of each turn.
        guide: as the teacher, for a recipe that needs one.
    Raises: TrainingError: the guide is missing, would do nothing, or is for other data.
    """
    require_guide(recipe, guide)
    method = recipe.method_class
    networks = build_roles(recipe, flow, guide)
    probe = Probe(method, recipe.method, networks, NoiseRange.of(flow))
    offloaded, loads = "teacher" in machine.offload, list[int]()
    for role, network in probe.networks.items():
        if not isinstance(network, FlowNetwork):
            continue
        if offloaded and recipe.roles[role].frozen:
            _offload(network, loads)
        if machine.checkpointing:
            network.network.checkpoint_blocks()

    pieces = machine.loss_pieces if method.splits_loss else 1
    probe.method.pieces = Pieces(pieces)
    effective = effective_weights(probe.networks) if machine.shares_weights else []

    # Two images, or groups, a piece and three, for every turn: the live bytes of each moment grow linearly with them.
    # The third pass lacks one, so that the first of several pieces is smaller than the others.
    passes, flops, calls, loaded = {}, 0.0, 0, 0
    step = pieces * probe.group_size
    rows = ROWS * step
    for turn, times in Counter(probe.turns).items():
        on_progress(f"the {turn.role}'s turn")
        few, more = (_trace(probe, turn, count, effective, loads) for count in (rows, rows + step))
        taken = 2
        lacks_one = few
        if pieces > 1:
            lacks_one, taken = _trace(probe, turn, rows + step - probe.group_size, effective, loads), 3
        passes[turn.role] = Pass(
            few.trained,
            uneven_lines(few.live, lacks_one.live, more.live, rows, step, pieces),
            uneven_lines(few.activations, lacks_one.activations, more.activations, rows, step, pieces),
        )
        flops += times * few.flops / rows
        calls += times * len(few.live)
        loaded += times * sum(loads) // taken
        loads.clear()
    return Measurement(recipe, probe.networks, passes, offloaded, flops, forward_flops(flow), calls, loaded)


def forward_flops(flow: FlowNetwork) -> float:
    """Returns the operations of one pass for one image; a multiplication and an addition are two."""
    network = copy.deepcopy(flow).to("meta").requires_grad_(False)
    x_t = torch.empty(1, flow.img_channels, flow.img_resolution, flow.img_resolution, device="meta")
    labels = torch.empty(1, flow.label_dim, device="meta") if flow.label_dim else None
    with fused_attention(), Ledger() as ledger:
        network(x_t, torch.empty(1, device="meta"), labels)
    return float(ledger.flops)


def make_plan(measured: Measurement, machine: Machine = Machine(), processes: int = 1) -> Plan:
    """Returns the plan for a machine, whose checkpointing and offloaded teacher are those of `measure`."""
    method, networks, passes = measured.recipe.method_class, measured.networks, measured.passes
    sizes = {role: _bytes(network.state_dict().values()) for role, network in networks.items()}
    trained = {role: turn.trained for role, turn in passes.items()}
    states = {role: state_bytes(measured.recipe.training.of(role), machine.second_moment) for role in trained}
    averages = len(profiles(measured.recipe.ema)) * sizes[method.product]
    if measured.offloaded:
        sizes |= {name: 0 for name, role in measured.recipe.roles.items() if role.frozen}
    replicated = processes > 1 and not machine.shard
    flows = {role: network for role, network in networks.items() if isinstance(network, FlowNetwork)}
    shares = {role: processes if machine.shard and role in flows else 1 for role in networks}
    return Plan(
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in networks.items()},
        weights={role: size // shares[role] for role, size in sizes.items()},
        gradients={role: size // shares[role] for role, size in trained.items()},
        passes=passes,
        averages=0 if "ema" in machine.offload else averages // shares[method.product],
        optimizer=0
        if "optimizer" in machine.offload
        else sum(states[role] * size // 4 // shares[role] for role, size in trained.items()),
        buckets=sum(trained.values()) if replicated else 0,
        gathered=max(map(_gathered, flows.values())) if machine.shard else 0,
        sharded=machine.shard,
        flops=measured.flops,
        forward_flops=measured.forward_flops,
        calls=measured.calls,
        group_size=measured.recipe.group_size,
    )


def split_batch(recipe: Recipe, processes: int, micro_batch: int | None) -> tuple[int, int]:
    """Returns the largest share of a process, and the images of the largest of its micro-batches.

    Args:
        micro_batch: the most images of one, of which the share makes as few as it can, of about one size; None: the
            whole share.
    Raises: TrainingError: the batch cannot be split so.
    """
    rows = split_rows(recipe.training.batch, processes - 1, processes, micro_batch, recipe.group_size)  # the last's
    return rows[-1].stop - rows[0].start, max(piece.stop - piece.start for piece in rows)


def used(machine: Machine, recipe: Recipe, processes: int, micro_batch: int | None) -> Machine:
    """Returns a machine as a run uses it: a loss has no more pieces than its smallest micro-batch has images.

    Args: as for `split_batch`.
    """
    batch = recipe.training.batch
    count = len(split_rows(batch, processes - 1, processes, micro_batch, recipe.group_size))
    return machine._replace(loss_pieces=machine.pieces(batch, processes, count))


def images_per_second(
    plan: Plan, gpu: GPU, precision: str, utilization: float, processes: int, batch: int, micro_batch: int
) -> float:
    """Returns the speed at a share `utilization` of the GPUs' peak, or, for small networks, that of launching calls.

    Args:
        batch: of all processes.
        micro_batch: of one.
    """
    multiplied = utilization * gpu.flops(precision) * processes / plan.flops
    count = -(-batch // (processes * micro_batch))
    return min(multiplied, batch / (count * plan.calls * gpu.launch))


class Trace(NamedTuple):
    """A turn on the meta device.

    Attributes:
        trained: bytes of the weights that its loss reaches.
        live, activations: bytes after each call of torch; activations without gradients of weights.
    """

    trained: int
    live: list[int]
    activations: list[int]
    flops: float


def _trace(probe: Probe, turn: Turn, rows: int, effective: Sequence[EffectiveWeights], loads: list[int]) -> Trace:
    network = probe.set_trainable(turn.role)
    with fused_attention(), Ledger() as ledger:
        record, replay = partial(ledger.record, loads=loads), partial(ledger.replay, loads=loads)
        with cached_passes(probe.networks.values(), record, replay), shared_weights(effective):
            torch.autograd.backward(probe.loss(turn, rows).value.mean())
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        allocated = [0] * len(ledger.live)
        for gradient in gradients:
            call, size = ledger.allocations[gradient.untyped_storage()._cdata]
            allocated[call] += size
    network.zero_grad(set_to_none=True)
    activations = [live - held for live, held in zip(ledger.live, accumulate(allocated), strict=True)]
    return Trace(_bytes(gradients), ledger.live, activations, ledger.flops)


def _offload(network: FlowNetwork, loads: list[int]) -> None:
    """Imitates machine.offload: each layer has weights while it works, and autograd keeps those that it needs.

    They are loaded around `forward` itself, which a checkpointed block calls again.

    Args:
        loads: gets the bytes of each load.
    """
    for module in network.network.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if parameters:
            module.forward = partial(_with_weights, module, parameters, loads, module.forward)


def _with_weights(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    loads: list[int],
    forward: Callable[..., Any],
    *args: Any,
    **more: Any,
) -> Any:
    loads.append(_bytes(parameters.values()))
    loaded = {name: nn.Parameter(torch.empty_like(p), requires_grad=False) for name, p in parameters.items()}
    module._parameters |= loaded
    out = forward(*args, **more)
    module._parameters |= parameters
    return out


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gathered(network: FlowNetwork) -> int:
    """Returns the bytes that FSDP2 has unsharded at one time: what is in no block, a block and the next one, which it
    prefetches, and the gradient of one."""
    blocks = sorted(_bytes(block.parameters()) for block in network.network.blocks())
    return _bytes(network.parameters()) - sum(blocks) + sum(blocks[-2:]) + blocks[-1]
