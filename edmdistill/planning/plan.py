"""What a run will need, before anything is loaded: bytes by what they are for, operations, and how long it takes.

Every turn of the method is taken on the meta device, where tensors have shapes and no numbers. What lives at once is
counted there, so that activations are what autograd keeps, not a formula. Two sizes of a micro-batch tell the others.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from edmdistill.machine.engine import Machine
from edmdistill.machine.gpus import GPU
from edmdistill.methods.base import NoiseRange, Turn
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.schema import Recipe
from edmdistill.training.checks import require_guide
from edmdistill.training.ema import profiles
from edmdistill.training.probe import ROWS, Probe
from edmdistill.training.roles import build_roles

FREE = 0.05
"""Share of a GPU's memory that is left for CUDA itself and for fragments."""

ATEN = torch.ops.aten
FLASH = ATEN._scaled_dot_product_flash_attention_for_cpu
"""Of all fused kernels the one that gives back nothing but what autograd needs."""
FLOPS = flop_registry | {
    FLASH: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}

Line = tuple[int, int]
"""Bytes without images, and bytes for each image."""
Lines = tuple[Line, ...]
"""The moments of a pass: what lives then. The highest line counts."""


class Pass(NamedTuple):
    """A forward and a backward pass of one turn.

    Attributes:
        learnt: bytes of the weights that the turn trains.
        whole: with the gradients of these weights, as they come.
        activations: without them.
    """

    learnt: int
    whole: Lines
    activations: Lines


class Plan(NamedTuple):
    """What one process needs.

    Attributes:
        parameters: by role.
        weights, averages, optimizer: bytes that are always there; weights by role.
        buckets: bytes in which DDP keeps the gradients of all trained roles.
        gathered: bytes of what FSDP2 has whole at one time.
        gradients: bytes that a turn gathers, by role.
        passes: by role.
        sharded: whether FSDP2 shares out what is here.
        flops: operations of one round for an image, forward and backward, those done again among them.
        forward_flops: of one pass of the product's network.
        calls: of torch in one round of micro-batches.
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    averages: int
    optimizer: int
    buckets: int
    gathered: int
    gradients: dict[str, int]
    passes: dict[str, Pass]
    sharded: bool
    flops: float
    forward_flops: float
    calls: int

    @property
    def resident(self) -> int:
        """Bytes between two turns."""
        return sum(self.weights.values()) + self.averages + self.optimizer + self.buckets + self.gathered

    def turn(self, role: str, micro_batch: int, accumulates: bool = True) -> tuple[int, int]:
        """Bytes of gradients, and of what else a turn's pass has at most. Where gradients come and go with the pass
        or are in DDP's buckets, there are none beside it.

        Args:
            accumulates: whether the pass is one of several, so that gradients are there before it. DDP moves them into
                its buckets after the last.
        """
        own = self.passes[role]
        if accumulates or self.sharded:
            return self.gradients[role], _highest(own.activations, micro_batch)
        return 0, _highest(own.activations if self.buckets else own.whole, micro_batch)

    def peaks(self, micro_batch: int, accumulates: bool = True) -> dict[str, int]:
        """Bytes at most in every turn, by role."""
        return {role: self.resident + sum(self.turn(role, micro_batch, accumulates)) for role in self.passes}

    def peak(self, micro_batch: int, accumulates: bool = True) -> int:
        """Bytes at most."""
        return max(self.peaks(micro_batch, accumulates).values())

    def largest_micro_batch(self, memory: float, most: int) -> int:
        """The most images of one of several passes, `most` at most, in so many bytes; 0: not even one fits."""
        return bisect_right(range(1, most + 1), memory * (1 - FREE), key=self.peak)


class Measured(NamedTuple):
    """A round on the meta device; what is in it is said at Plan, where the machine is known too."""

    recipe: Recipe
    networks: dict[str, nn.Module]
    passes: dict[str, Pass]
    lent: bool
    flops: float
    forward_flops: float
    calls: int


def measure(
    recipe: Recipe,
    flow: FlowNetwork,
    machine: Machine = Machine(),
    on_progress: Callable[[str], object] = lambda stage: None,
    *,
    guide: FlowNetwork | None = None,
) -> Measured:
    """Takes every turn of a recipe on the meta device.

    Args:
        flow: the teacher, or what a method without one makes; on any device, for its numbers do not count.
        machine: only checkpointing and a teacher in the host's memory change a pass; the rest is `make_plan`'s.
        on_progress: is told what is being looked at.
        guide: as the teacher, for a recipe that takes one.
    Raises: TrainingError: no guide for such a recipe, one for another, or one of other data.
    """
    require_guide(recipe, guide)
    method = recipe.method_class
    roles = build_roles(recipe, flow, guide)
    noise = NoiseRange(flow.sigma_data, flow.sigma_min, flow.sigma_max)
    probe = Probe(method, recipe.method, roles, noise)
    lent = "teacher" in machine.offload
    for role, network in probe.networks.items():
        if not isinstance(network, FlowNetwork):
            continue
        if lent and recipe.roles[role].frozen:
            _lend(network)
        if machine.checkpointing:
            network.network.checkpoint_blocks()

    # Two images and three, of every turn: what lives at a moment of it grows evenly with the images.
    passes, flops, calls = {}, 0.0, 0
    for turn in probe.turns:
        on_progress(f"the {turn.role}'s turn")
        two, three = (_follow(probe, turn, rows) for rows in (ROWS, ROWS + 1))
        passes[turn.role] = Pass(two.learnt, _lines(two.live, three.live), _lines(two.own, three.own))
        flops += two.flops / ROWS
        calls += len(two.live)
    return Measured(recipe, probe.networks, passes, lent, flops, forward_flops(flow), calls)


def forward_flops(flow: FlowNetwork) -> float:
    """Operations of one pass for one image; a multiplication and an addition are two."""
    network = copy.deepcopy(flow).to("meta").requires_grad_(False)
    x_t = torch.empty(1, flow.img_channels, flow.img_resolution, flow.img_resolution, device="meta")
    labels = torch.empty(1, flow.label_dim, device="meta") if flow.label_dim else None
    with fused_attention(), Ledger() as ledger:
        network(x_t, torch.empty(1, device="meta"), labels)
    return float(ledger.flops)


def make_plan(measured: Measured, machine: Machine = Machine(), processes: int = 1) -> Plan:
    """Lays what was measured out on a machine, whose checkpointing and lent teacher are those of `measure`."""
    method, networks, passes = measured.recipe.method_class, measured.networks, measured.passes
    sizes = {role: _bytes(network.state_dict().values()) for role, network in networks.items()}
    learnt = {role: own.learnt for role, own in passes.items()}
    states = 2 if measured.recipe.training.optimizer == "adam8bit" else 8  # bytes a parameter
    averages = len(profiles(measured.recipe.ema)) * sizes[method.product]
    if measured.lent:
        sizes |= {role: 0 for role, part in measured.recipe.roles.items() if part.frozen}
    replicated = processes > 1 and not machine.shard
    flows = {role: network for role, network in networks.items() if isinstance(network, FlowNetwork)}
    shares = {role: processes if machine.shard and role in flows else 1 for role in networks}
    return Plan(
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in networks.items()},
        weights={role: size // shares[role] for role, size in sizes.items()},
        averages=0 if "ema" in machine.offload else averages // shares[method.product],
        optimizer=0
        if "optimizer" in machine.offload
        else sum(states * size // 4 // shares[role] for role, size in learnt.items()),
        buckets=sum(learnt.values()) if replicated else 0,
        gathered=max(map(_largest_piece, flows.values())) if machine.shard else 0,
        gradients={role: size // shares[role] for role, size in learnt.items()},
        passes=passes,
        sharded=machine.shard,
        flops=measured.flops,
        forward_flops=measured.forward_flops,
        calls=measured.calls,
    )


def images_per_second(
    plan: Plan, gpu: GPU, half: bool, utilisation: float, processes: int, batch: int, micro_batch: int
) -> float:
    """Returns the speed at a share `utilisation` of what the GPUs can multiply, or, of small networks, at that of the
    calls of torch.

    Args:
        batch: of all processes.
        micro_batch: of one.
    """
    multiplied = utilisation * (gpu.half if half else gpu.single) * processes / plan.flops
    pieces = -(-batch // (processes * micro_batch))
    return min(multiplied, batch / (pieces * plan.calls * gpu.launch))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of tensors that are made within it and still live, and counts operations.

    Attributes:
        live: bytes after each call of torch.
        births: the call, by number, that made a storage, and its bytes.
        flops: of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: list[int] = []
        self.births: dict[int, tuple[int, int]] = {}
        self.flops = 0.0
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.births.keys() | given:
                    self.births[storage._cdata] = len(self.live), storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.live.append(self._now)
        return out

    def _forget(self, storage: int) -> None:
        self._now -= self.births.pop(storage)[1]


class Followed(NamedTuple):
    """A turn: bytes of the weights that its loss reaches; after each call of torch the bytes of all that lives, and of
    what is not gradients of weights; operations."""

    learnt: int
    live: list[int]
    own: list[int]
    flops: float


def _follow(probe: Probe, turn: Turn, rows: int) -> Followed:
    network = probe.set_trainable(turn.role)
    with fused_attention(), Ledger() as ledger:
        torch.autograd.backward(probe.loss(turn, rows).value.mean())
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        born = [0] * len(ledger.live)
        for gradient in gradients:
            birth, size = ledger.births[gradient.untyped_storage()._cdata]
            born[birth] += size
    network.zero_grad(set_to_none=True)
    own = [live - grown for live, grown in zip(ledger.live, accumulate(born), strict=True)]
    return Followed(_bytes(gradients), ledger.live, own, ledger.flops)


def _lines(low: list[int], high: list[int]) -> Lines:
    """What grows from `low` to `high` bytes with one image more than ROWS, moment by moment."""
    return _envelope((a - ROWS * (b - a), b - a) for a, b in zip(low, high, strict=True))


def _lend(network: FlowNetwork) -> None:
    """As Engine.offload: each layer has weights while it works; those that autograd keeps live on.

    What brings them stands before and after `forward` itself, which a checkpointed block calls again.
    """
    for module in network.network.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            module.forward = partial(_with_weights, module, own, module.forward)


def _with_weights(module: nn.Module, own: dict[str, nn.Parameter], forward: Callable[..., Any], *args: Any) -> Any:
    module._parameters |= {name: nn.Parameter(torch.empty_like(p), requires_grad=False) for name, p in own.items()}
    out = forward(*args)
    module._parameters |= own
    return out


def _envelope(lines: Iterable[Line]) -> Lines:
    """Those of the lines that are the highest for some number of images."""
    upper: list[Line] = []
    for fixed, each in sorted(set(lines), key=lambda line: (line[1], line[0])):
        while upper and (upper[-1][1] == each or _crosses_before(upper, (fixed, each))):
            upper.pop()
        upper.append((fixed, each))
    return tuple(upper)


def _crosses_before(upper: list[Line], new: Line) -> bool:
    """Whether the last of the lines is nowhere above both the one before it and the new, steeper one."""
    if len(upper) == 1:
        return new[0] >= upper[0][0]
    (a, b), (c, d), (e, f) = upper[-2], upper[-1], new
    return (a - e) * (d - b) <= (a - c) * (f - b)


def _highest(lines: Lines, images: int) -> int:
    return max(fixed + images * each for fixed, each in lines)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as a fused kernel does it: without the matrix of all pairs, which the meta device would make.

    A mode of torch functions would not reach what a checkpointed block computes again in the backward pass.
    """
    own = functional.scaled_dot_product_attention

    def scaled_dot_product_attention(q: Any, k: Any, v: Any) -> Any:
        if has_torch_function((q, k, v)):  # with tangents: by their rule, as torch's own
            return handle_torch_function(scaled_dot_product_attention, (q, k, v), q, k, v)
        return FLASH(q, k, v)[0]

    functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _largest_piece(network: FlowNetwork) -> int:
    """What FSDP2 has whole at one time: what is in no block, a block, the next one, which it fetches meanwhile, and the
    gradient of one."""
    blocks = sorted(_bytes(block.parameters()) for block in network.network.blocks())
    return _bytes(network.parameters()) - sum(blocks) + sum(blocks[-2:]) + blocks[-1]
