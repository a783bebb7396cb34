"""What a run will need, before anything is loaded: bytes by what they are for, operations, and how long it takes.

Every turn of the method is taken on the meta device, where tensors have shapes and no numbers. What lives at once is
counted there, so that activations are what autograd keeps, not a formula. Two sizes of a micro-batch tell the others.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from edmdistill.methods.base import NoiseRange, Turn
from edmdistill.networks.preconditioning import FlowNetwork
from edmdistill.recipes import Recipe
from edmdistill.training.cards import Card
from edmdistill.training.ema import profiles
from edmdistill.training.engine import Machine
from edmdistill.training.probe import ROWS, Probe
from edmdistill.training.run import cast

FREE = 0.05
"""Share of a card's memory that is left for CUDA itself and for fragments."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP gathers before it sends them."""
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


Line = tuple[int, int]
"""Bytes without images, and bytes for each image."""


class Plan(NamedTuple):
    """What one process needs.

    Attributes:
        parameters: by role.
        weights, averages, optimizer: bytes that are always there; weights by role.
        gradients: bytes of the role with the most, or of all where DDP keeps them.
        gathered: bytes of what FSDP2 has whole at one time, or of the largest layer that is lent.
        passes: a forward and a backward pass, its own gradients among it: at each moment, what lives then.
        activations: the same without gradients.
        flops: operations of one round for an image, forward and backward.
        forward_flops: of one pass of the product's network.
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    averages: int
    optimizer: int
    gradients: int
    gathered: int
    passes: tuple[Line, ...]
    activations: tuple[Line, ...]
    flops: float
    forward_flops: float

    @property
    def resident(self) -> int:
        """Bytes between two turns, without gradients."""
        return sum(self.weights.values()) + self.averages + self.optimizer + self.gathered

    def peak(self, micro_batch: int, accumulates: bool = True) -> int:
        """Bytes at most.

        Args:
            accumulates: whether gradients are there before the pass: of an earlier micro-batch, or in DDP's buckets.
        """
        if accumulates:
            return self.resident + self.gradients + _highest(self.activations, micro_batch)
        return self.resident + _highest(self.passes, micro_batch)

    def largest_micro_batch(self, memory: float) -> int:
        """The most images of one pass in so many bytes; 0: not even one fits."""
        room = memory * (1 - FREE) - self.resident - self.gradients
        return max(0, min(int((room - fixed) // each) for fixed, each in self.activations if each > 0))


class Measured(NamedTuple):
    """A round on the meta device; what is in it is said at Plan, where the machine is known too."""

    recipe: Recipe
    networks: dict[str, FlowNetwork]
    learnt: dict[str, int]
    passes: tuple[Line, ...]
    activations: tuple[Line, ...]
    flops: float
    forward_flops: float


def measure(
    recipe: Recipe,
    flow: FlowNetwork,
    checkpointing: bool = False,
    on_progress: Callable[[str], object] = lambda stage: None,
) -> Measured:
    """Takes every turn of a recipe on the meta device.

    Args:
        flow: the teacher, or what a method without one makes; on any device, for its numbers do not count.
        checkpointing: see Machine.
        on_progress: is told what is being looked at.
    """
    method = recipe.method_class
    roles = {role: cast(part, flow, recipe) for role, part in method.roles.items()}
    if checkpointing:
        for network in roles.values():
            network.network.checkpoint_blocks()
    noise = NoiseRange(flow.sigma_data, flow.sigma_min, flow.sigma_max)
    probe = Probe(method, recipe.method_config, roles, noise)
    on_progress("operations")
    one = forward_flops(flow)
    with _counter() as all_, fused_attention():
        unused = probe.unused()

    # Two images and three, of every turn: what lives at a moment of it grows evenly with the images.
    passes: list[Line] = []
    activations: list[Line] = []
    learnt = {}
    for turn in probe.turns:
        on_progress(f"the {turn.role}'s turn")
        network = probe.take_stage(turn.role)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in unused[turn.role])
        learnt[turn.role] = _bytes(parameter for parameter in network.parameters() if parameter.requires_grad)
        two, three = (_follow(probe, turn, rows) for rows in (ROWS, ROWS + 1))
        for lines, low, high in ((passes, two.live, three.live), (activations, two.own, three.own)):
            lines += [(low - ROWS * (high - low), high - low) for low, high in zip(low, high, strict=True)]
    flops = all_.get_total_flops() / ROWS
    return Measured(recipe, probe.networks, learnt, _envelope(passes), _envelope(activations), flops, one)


def forward_flops(flow: FlowNetwork) -> float:
    """Operations of one pass for one image; a multiplication and an addition are two."""
    network = copy.deepcopy(flow).to("meta").requires_grad_(False)
    x_t = torch.empty(1, flow.img_channels, flow.img_resolution, flow.img_resolution, device="meta")
    labels = torch.empty(1, flow.label_dim, device="meta") if flow.label_dim else None
    with _counter() as counter, fused_attention():
        network(x_t, torch.empty(1, device="meta"), labels)
    return float(counter.get_total_flops())


def make_plan(measured: Measured, machine: Machine = Machine(), processes: int = 1) -> Plan:
    """Lays what was measured out on a machine, whose micro-batch and checkpointing do not count here."""
    method, networks, learnt = measured.recipe.method_class, measured.networks, measured.learnt
    frozen = [role for role in networks if role not in learnt]
    replicated = processes > 1 and not machine.shard
    sizes = {role: _bytes(network.state_dict().values()) for role, network in networks.items()}
    states = 2 if measured.recipe.training.optimizer == "adam8bit" else 8  # bytes a parameter
    averages = len(profiles(measured.recipe.ema)) * sizes[method.product]
    gathered = max(map(_largest_piece, networks.values())) if machine.shard else 0
    if "teacher" in machine.offload:
        gathered = max((_largest_layer(networks[role]) for role in frozen), default=0)
        sizes |= dict.fromkeys(frozen, 0)
    gradients = sum(learnt.values()) + BUCKET if replicated else max(learnt.values())
    shares = processes if machine.shard else 1
    return Plan(
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in networks.items()},
        weights={role: size // shares for role, size in sizes.items()},
        averages=0 if "ema" in machine.offload else averages // shares,
        optimizer=0 if "optimizer" in machine.offload else states * sum(learnt.values()) // 4 // shares,
        gradients=gradients // shares,
        gathered=gathered,
        passes=measured.passes,
        activations=measured.activations,
        flops=measured.flops,
        forward_flops=measured.forward_flops,
    )


def images_per_second(plan: Plan, card: Card, half: bool, utilisation: float, processes: int) -> float:
    """At a share `utilisation` of what the cards can multiply."""
    return utilisation * (card.half if half else card.single) * processes / plan.flops


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of tensors that are made within it and still live.

    Attributes:
        live: after each operation.
        births: the operation, by number, that made a storage, and its bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: list[int] = []
        self.births: dict[int, tuple[int, int]] = {}
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
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
    """Bytes after each operation of a turn: all that live, and those that are not gradients of weights."""

    live: list[int]
    own: list[int]


def _follow(probe: Probe, turn: Turn, rows: int) -> Followed:
    network = probe.networks[turn.role]
    with fused_attention(), LiveBytes() as bytes_:
        torch.autograd.backward(probe.loss(turn, rows).value.mean())
        gradients = [0] * (len(bytes_.live) + 1)
        for parameter in network.parameters():
            if parameter.grad is not None:
                birth, size = bytes_.births[parameter.grad.untyped_storage()._cdata]
                gradients[birth] += size
    network.zero_grad(set_to_none=True)
    return Followed(
        bytes_.live, [live - grown for live, grown in zip(bytes_.live, accumulate(gradients), strict=False)]
    )


def _envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
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


def _highest(lines: Iterable[Line], images: int) -> int:
    return max(fixed + images * each for fixed, each in lines)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as a fused kernel does it: without the matrix of all pairs, which the meta device would make.

    A mode of torch functions would not reach what a checkpointed block computes again in the backward pass.
    """
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v: FLASH(q, k, v)[0]  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _counter() -> FlopCounterMode:
    def forward(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    def backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]

    own = {FLASH: forward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=own)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _largest_piece(network: FlowNetwork) -> int:
    """What FSDP2 has whole at one time: a block, the next one, which it fetches meanwhile, and what is in no block."""
    blocks = sorted(_bytes(block.parameters()) for block in network.network.blocks())
    return sum(blocks[-2:]) + _bytes(network.parameters()) - sum(blocks)


def _largest_layer(network: FlowNetwork) -> int:
    return max(_bytes(module.parameters(recurse=False)) for module in network.modules())
