"""Checks arguments against their annotations, so that the function that got a wrong type says so in one sentence."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.torch_state import torch_as_it_starts

P = ParamSpec("P")
R = TypeVar("R")

_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    NoneType: "None",
    Tensor: "a tensor",
    torch.device: "a torch.device",
    torch.dtype: "a torch.dtype such as torch.bfloat16",
}
_NAMED = {"Generator": "a network of load_generator", "Denoiser": "a network of load_denoiser"}
_NUMBERS: dict[object, type] = {int: numbers.Integral, float: numbers.Real}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: it raises EdmDistillError where an argument is not what its annotation says.

    It gets numpy's numbers as Python's, and an array or a tensor as a list unless it takes tensors. What the user told
    torch has no effect in it, see `torch_as_it_starts`.
    """
    expected = signature(function)

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = expected.bind(*args, **kwargs)
        except TypeError:  # a name that it does not have, or lacks: Python's words name the function
            return function(*args, **kwargs)
        hints = _hints(function)  # not before: its module may be incomplete
        for name, value in given.arguments.items():
            given.arguments[name] = required(value, hints.get(name, Any), f"{function.__name__}: {name}")
        with torch_as_it_starts():
            return function(*given.args, **given.kwargs)

    return wrapped


def require_fields(record: Any) -> None:
    """Does to the fields of a dataclass what `checked` does to arguments.  Raises: EdmDistillError: one is wrong."""
    for name, hint in _hints(record.__class__).items():
        value = required(getattr(record, name), hint, f"{type(record).__name__}: {name}")
        object.__setattr__(record, name, value)


@cache
def _hints(annotated: Any) -> dict[str, Any]:
    return get_type_hints(annotated)


def required(value: object, hint: Any, what: str) -> object:
    """Returns a value of a type, as plain Python where that is all it takes.

    Args:
        what: begins the sentence.
    Raises: EdmDistillError: it is not of that type.
    """
    if hint is Any:
        return value
    if not fits(value, hint):
        raise EdmDistillError(f"{what} = {shown(value)} must be {described(hint)}")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and Tensor not in (hint, *get_args(hint))):
        return value.tolist()
    return value


def fits(value: object, hint: Any) -> bool:
    """Returns whether a value is of a type; numbers, arrays and tensors of torch and numpy count as Python's."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return callable(value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        if isinstance(value, Tensor | np.ndarray):
            return value.ndim == 1 and all(fits(item, parts[0]) for item in value[:1].tolist())
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return False
        return isinstance(value, range) or all(fits(item, parts[0]) for item in value)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    try:
        return not isinstance(hint, type) or isinstance(value, hint)
    except TypeError:  # of a Protocol that is not checked at run time
        return True


def described(hint: Any) -> str:
    """Returns a type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [described(part) for part in parts if getattr(part, "__name__", "") != "Source"]  # of our own use
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    if origin is not None and issubclass(origin, Mapping):
        return "a dict"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {described(parts[0]).removeprefix('a ')}s"
    name = str(getattr(hint, "__name__", hint))
    return _WORDS.get(hint) or _NAMED.get(name) or f"an {hint.__module__}.{name}"


def shown(value: object) -> str:
    """Returns a value as a sentence shows it: short, and an array by its shape alone."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"(a {kind}, {str(value.dtype).removeprefix('torch.')} {list(value.shape)})"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"(a {type(value).__name__})"
