"""Counts bytes and operations of what torch computes on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from edmdistill.training.meta import CachedShapes, Outputs, returns_aliases

ATEN = torch.ops.aten
FLASH = ATEN._scaled_dot_product_flash_attention_for_cpu
"""The fused kernel that returns only what autograd needs."""
FLOPS = flop_registry | {
    FLASH: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class Recorded(NamedTuple):
    """The cost of one pass of a network.

    Attributes:
        live: bytes after each call of torch, beside those before the pass.
        flops: operations.
        loads: bytes of each load of weights.
        outputs: what it returns.
    """

    live: list[int]
    flops: float
    loads: list[int]
    outputs: Outputs


class Ledger(CachedShapes):  # type: ignore[no-untyped-call]
    """Follows the bytes of live tensors that are made within it, and counts operations.

    What lies in the host's memory is left out: constants that the first pass makes and keeps.

    Attributes:
        live: bytes after each call of torch.
        allocations: the call, by number, that allocated a storage, and its bytes.
        flops: of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: list[int] = []
        self.allocations: dict[int, tuple[int, int]] = {}
        self.flops = 0.0
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        made = _storages(out)
        if any(storage.device.type == "cpu" for storage in made):
            return out
        inputs = {storage._cdata for storage in _storages((args, *kwargs.values()))} if returns_aliases(func) else set()
        for storage in made:
            if storage._cdata not in self.allocations and storage._cdata not in inputs:
                self.allocations[storage._cdata] = len(self.live), storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.live.append(self._now)
        return out

    def record(self, run: Callable[[], Any], loads: list[int]) -> tuple[Any, Recorded | None]:
        """Returns what a pass returns, and what it takes; None where more than its outputs stays, as of a first pass.

        Args:
            loads: gets the bytes of each load of weights.
        """
        calls, before, flops, loaded = len(self.live), self._now, self.flops, len(loads)
        out = run()
        outputs = Outputs.of(out)
        if outputs is None or sum(leaf.nbytes for leaf in tree_leaves(out)) != self._now - before:
            return out, None
        live = [now - before for now in self.live[calls:]]
        return out, Recorded(live, self.flops - flops, loads[loaded:], outputs)

    def replay(self, recorded: Recorded, loads: list[int]) -> Any:
        """Counts a pass once more.  Returns: outputs like its own."""
        calls, before = len(self.live), self._now
        out = recorded.outputs.allocate()
        self.live[calls:] = [before + more for more in recorded.live]
        self.flops += recorded.flops
        loads += recorded.loads
        return out

    def _free(self, storage: int) -> None:
        self._now -= self.allocations.pop(storage)[1]


def _storages(value: Any) -> list[torch.UntypedStorage]:
    """Returns those of a tensor, or of the tensors in a tuple or list."""
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    return [storage for part in value for storage in _storages(part)] if isinstance(value, (tuple, list)) else []


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it, attention is computed as by a fused kernel, without the matrix of all pairs.

    A mode of torch functions would not reach what a checkpointed block recomputes in the backward pass.
    """
    original = functional.scaled_dot_product_attention

    def scaled_dot_product_attention(q: Any, k: Any, v: Any) -> Any:
        if has_torch_function((q, k, v)):  # with tangents: by their rule, as torch's own
            return handle_torch_function(scaled_dot_product_attention, (q, k, v), q, k, v)
        return FLASH(q, k, v)[0]

    functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
