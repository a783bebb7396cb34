"""The meta device with a memory: it derives the shapes of a repeated call once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        key = func, _shapes(args), _shapes(kwargs.items()), torch.get_default_dtype()
        if key in _OUTPUTS:
            new = tuple(
                torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in _OUTPUTS[key]
            )
            return new if len(func._schema.returns) > 1 else new[0]
        out = func(*args, **kwargs)
        leaves = out if isinstance(out, tuple) else (out,)
        if all(isinstance(leaf, Tensor) and leaf.is_meta and not leaf.storage_offset() for leaf in leaves):
            _OUTPUTS[key] = tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)
        return out


@cache
def returns_aliases(func: Any) -> bool:
    """Returns whether a function's outputs may share memory with its inputs: views, and changes in place."""
    return any(argument.alias_info for argument in (*func._schema.arguments, *func._schema.returns))


def _shapes(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """Returns all that the shapes of outputs depend on; numbers with their types, because 1 == 1.0."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device)
        if isinstance(value, Tensor)
        else _shapes(value)
        if isinstance(value, (tuple, list))
        else (type(value), value)
        for value in values
    )
