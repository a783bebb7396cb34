"""The defaults of options, and the refusal of options that another one leaves without effect."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct


def defaults(options: Struct | type[Struct]) -> dict[str, Any]:
    """Returns the default of every option that has one, by name."""
    return {
        field.name: field.default if field.default_factory is NODEFAULT else field.default_factory()
        for field in msgspec.structs.fields(options)
        if not field.required
    }


def refuse_idle(options: Struct, names: Iterable[str], where: str, fix: str) -> None:
    """Checks that options without effect are at their defaults.

    Args:
        names: of the options that nothing reads.
        where: what leaves them without effect, as in "gan = 0".
        fix: what gives them one, as in "set gan above 0".
    Raises: ValueError: some are not.
    """
    usual = defaults(options)
    changed = [name for name in names if getattr(options, name) != usual[name]]
    if changed:
        have = "has" if len(changed) == 1 else "have"
        kept = [f"no {name}" if usual[name] is None else f"{name} = {toml(usual[name])}" for name in changed]
        raise ValueError(f"with {where}, {' and '.join(changed)} {have} no effect: {fix}, or {' and '.join(kept)}")


def toml(value: object) -> str:
    """Returns a value as a recipe states it."""
    return json.dumps(msgspec.to_builtins(value))
