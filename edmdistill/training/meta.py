"""The meta device with a memory: it derives the shapes of a repeated call, or of a network's repeated pass, once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

T = TypeVar("T")

_OUTPUTS: dict[Hashable, tuple[tuple[Any, ...], ...]] = {}
"""Sizes, strides and dtypes of the tensors that each call on the meta device has returned."""


class CachedShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, a call on tensors of the meta device that has been made before only allocates its outputs.

    torch derives the shape of an output in hundreds of lines of Python, and networks repeat their layers. Views and
    changes in place are left to torch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if returns_aliases(func):
            return func(*args, **kwargs)
        key = func, shapes(args), shapes(kwargs.items()), torch.get_default_dtype()
        if key in _OUTPUTS:
            new = allocate(_OUTPUTS[key])
            return new if len(func._schema.returns) > 1 else new[0]
        out = func(*args, **kwargs)
        leaves = out if isinstance(out, tuple) else (out,)
        made = all(isinstance(leaf, Tensor) and leaf.is_meta and not leaf.storage_offset() for leaf in leaves)
        if made and not _storages(leaves) & _storages((*args, *kwargs.values())):  # _unsafe_view is a view
            _OUTPUTS[key] = layouts(leaves)
        return out


class Outputs(NamedTuple):
    """What a pass returns: the layouts of its tensors, and the tuple, list or tensor that they are."""

    layouts: tuple[tuple[Any, ...], ...]
    structure: TreeSpec

    @classmethod
    def of(cls, value: Any) -> Outputs | None:
        """Returns those of a value; None unless all that it holds are tensors of the meta device."""
        leaves, structure = tree_flatten(value)
        made = all(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)
        return cls(layouts(leaves), structure) if made else None

    def allocate(self) -> Any:
        return tree_unflatten(allocate(self.layouts), self.structure)


def record(run: Callable[[], Any]) -> tuple[Any, Outputs | None]:
    """Returns what a pass returns, and how to allocate its like."""
    out = run()
    return out, Outputs.of(out)


@contextmanager
def cached_passes(
    networks: Iterable[nn.Module],
    record: Callable[[Callable[[], Any]], tuple[Any, T | None]] = record,  # type: ignore[assignment]
    replay: Callable[[T], Any] = Outputs.allocate,  # type: ignore[assignment]
) -> Iterator[None]:
    """Within it, a pass without gradient that a network on the meta device has made before is not made again.

    A method may follow its teacher for a thousand steps.

    Args:
        record: makes a pass, and returns what it returns and what is known of it from then on; None: nothing.
        replay: from what is known, returns outputs like the pass's own.
    """
    patched = list(networks)
    for network in patched:
        network.forward = partial(_cached, network.forward, {}, record, replay)
    try:
        yield
    finally:
        for network in patched:
            del network.forward


def _cached(
    forward: Callable[..., Any],
    known: dict[Hashable, T],
    record: Callable[[Callable[[], Any]], tuple[Any, T | None]],
    replay: Callable[[T], Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if torch.is_grad_enabled():
        return forward(*args, **kwargs)
    key = shapes(args), shapes(kwargs.items())
    if key in known:
        return replay(known[key])
    out, recorded = record(partial(forward, *args, **kwargs))
    if recorded is not None:
        known[key] = recorded
    return out


def layouts(tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Returns sizes, strides and dtypes."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def allocate(made: Iterable[tuple[Any, ...]]) -> tuple[Tensor, ...]:
    """Returns tensors of these layouts."""
    return tuple(torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in made)


def _storages(values: Iterable[Any]) -> set[int]:
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}


@cache
def returns_aliases(func: Any) -> bool:
    """Returns whether a function's outputs may share memory with its inputs: views, and changes in place."""
    return any(argument.alias_info for argument in (*func._schema.arguments, *func._schema.returns))


def shapes(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """Returns all that the shapes of outputs depend on; numbers with their types, because 1 == 1.0."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device)
        if isinstance(value, Tensor)
        else shapes(value)
        if isinstance(value, (tuple, list))
        else (type(value), value)
        for value in values
    )
