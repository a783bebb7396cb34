"""The identity of a run: the keys of recipe.resolved.json and run.json that must not change on resumption."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edmdistill.checkpoints.layout import RECIPE, RUN
from edmdistill.errors import RecipeError, TrainingError
from edmdistill.recipes.schema import Recipe

MUTABLE = {f"training.{key}" for key in ("compile", "keep", "keep_every", "log_every", "snapshot_every")} | {
    "ema.snapshot_every",
    "data.name",
    "evaluation",
    "sampling",
}
"""Keys and tables that may change when a run resumes: nothing that is trained depends on them beyond rounding."""
TOTAL = "training.images"
"""May grow, unless a schedule depends on it."""


def require_same(path: Path, files: Mapping[str, bytes]) -> bool:
    """Returns whether a mutable key has changed.  Raises: TrainingError: another has."""
    written = _read_keys(path / RECIPE)
    before = {RECIPE: _with_defaults(path / RECIPE, written), RUN: _read_keys(path / RUN)}
    now = {name: _read_keys(path / name, files[name]) for name in (RECIPE, RUN)}
    old, new = (keys[RECIPE].get(TOTAL) for keys in (before, now))
    grows = isinstance(old, int) and isinstance(new, int) and new >= old
    mutable = MUTABLE | {TOTAL} if grows and now[RECIPE].get("training.lr_decay") != "linear" else MUTABLE
    changed = [line for name in (RECIPE, RUN) for line in _differences(before[name], now[name], mutable)]
    if changed:
        raise TrainingError(
            f"{path} belongs to another run; use another --run-dir, or the same recipe, teacher and data:",
            *changed,
        )
    return written != now[RECIPE]


def _with_defaults(file: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's recipe with the options that came after it, at their defaults, which change nothing."""
    try:
        return _flatten(json.loads(Recipe.from_json(file.read_bytes()).to_json()))
    except RecipeError:  # an option that is no longer there, or has another range
        return dict(keys)


def _read_keys(file: Path, text: bytes | None = None) -> dict[str, Any]:
    """Returns a JSON object of a run directory, keys joined by dots.  text: in place of the file's."""
    try:
        document = json.loads(file.read_bytes() if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        document = error
    if not isinstance(document, dict):
        raise TrainingError(
            f"{file} is damaged, so this run cannot be identified: restore it from a backup, or use another "
            f"--run-dir; {file.parent / 'generator'}, if it is there, can still be used"
        )
    return _flatten(document)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], mutable: Collection[str]) -> list[str]:
    """Returns a line for every key whose values differ and that is not mutable."""
    why = {
        TOTAL: "; it may only grow"
        if new.get("training.lr_decay") != "linear"
        else '; it may not change, because training.lr_decay = "linear" depends on it'
    }
    return [
        f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now{why.get(key, '')}"
        for key in sorted(key for key in old.keys() | new.keys() if {key, key.partition(".")[0]}.isdisjoint(mutable))
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def _flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, inner in value.items() for k, v in _flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }
