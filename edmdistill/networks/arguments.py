"""Types and ranges of constructor arguments, checked before anything is built.

Arguments are checked against the constructor's own annotations: so those of a file, a recipe or a program are refused
in one place, before the first layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from edmdistill.errors import validation_in_words


class Arg:
    """Types of arguments, by what they stand for.

    The limits are far beyond any trained network; they keep the arithmetic of shapes within 64 bits.
    """

    Resolution = Annotated[int, Meta(ge=1, le=16384)]
    Count = Annotated[int, Meta(ge=1, le=64)]
    Blocks = Annotated[int, Meta(ge=0, le=64)]
    Classes = Annotated[int, Meta(ge=0, le=2**24)]
    ImageChannels = Annotated[int, Meta(ge=1, le=1024)]
    Channels = Annotated[int, Meta(ge=1, le=2**24)]
    OptionalChannels = Annotated[int, Meta(ge=0, le=65536)]
    """0 = the layer is left out."""
    Multipliers = Annotated[Sequence[Count], Meta(min_length=1, max_length=12)]
    Resolutions = Annotated[Sequence[Resolution], Meta(max_length=32)]
    Taps = Annotated[Sequence[Annotated[float, Meta(ge=-1e6, le=1e6)]], Meta(min_length=2, max_length=16)]
    Dropout = Annotated[float, Meta(ge=0, lt=1)]
    Fraction = Annotated[float, Meta(ge=0, le=1)]
    Limit = Annotated[float, Meta(gt=0, le=1e9)]


def validated(values: Mapping[str, Any], type_: Any) -> Any:
    """Returns a table as an object of `type_`.

    Raises: ValueError: a value of the wrong type or out of range, an unknown or missing key; the message names it.
    """
    try:
        return msgspec.convert(values, type_)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        place = place.strip(".`")
        rest = validation_in_words(problem[:200])
        if problem.startswith("Invalid enum") and (choices := _choices(type_, place)):
            rest += f", where {' or '.join(map(str, choices))} is needed"
        raise ValueError((place[:100] or "it") + rest if place or rest[0] == " " else rest[2:]) from None


def _choices(type_: Any, name: str) -> tuple[Any, ...]:
    """Returns the values that a field of a struct type may have; none of a field that is not there."""
    fields = msgspec.structs.fields(type_) if hasattr(type_, "__struct_fields__") else ()
    return next((get_args(field.type) for field in fields if field.name == name), ())


@cache
def _signature(class_: type) -> type[Struct]:
    """Returns a struct type with the fields of a constructor's parameters."""
    constructor: Any = class_.__init__  # type: ignore[misc]
    hints = get_type_hints(constructor, include_extras=True)
    fields: list[Any] = []
    for name, parameter in inspect.signature(class_).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        fields.append((name, hints[name]) if required else (name, hints[name], parameter.default))
    return msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True)


def check_arguments(class_: type, arguments: Mapping[str, Any]) -> None:
    """Checks arguments against the annotations of a network's constructor.

    Raises: ValueError: an argument that they do not allow, or a combination that makes no U-Net.
    """
    checked = validated(arguments, _signature(class_))
    levels = len(getattr(checked, "channel_mult", (1,)))
    if checked.img_resolution % 2 ** (levels - 1):
        raise ValueError(
            f"img_resolution is {checked.img_resolution}, which cannot be halved {levels - 1} times, as the {levels} "
            "levels of channel_mult require"
        )
    taps = getattr(checked, "resample_filter", (1, 1))
    if len(taps) % 2 or not abs(sum(taps)) > 1e-6:
        raise ValueError(f"resample_filter is {list(taps)}, but must be an even number of taps with a nonzero sum")
