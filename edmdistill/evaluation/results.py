"""Results that stay with what they were measured of: in a run's eval/, and in the config.json of a checkpoint.

Those of a run lie in RUN/eval, a file each, where they outlive the checkpoint that goes on training. Those of the
checkpoint as it is now are in its config.json as well, and travel with the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.config import CheckpointConfig, read_config, write_config
from edmdistill.checkpoints.layout import CONFIG, checkpoint_in
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import Result, results_json
from edmdistill.evaluation.tables import read_results

EVAL, RECIPE = "eval", "recipe.toml"
"""A run's folder of results, and the file by which a run directory is known."""


def saved_results(config: CheckpointConfig) -> list[Result]:
    """The results in a configuration.  Raises: EdmDistillError: they are not what we write."""
    try:
        return msgspec.convert(config.results, list[Result])
    except msgspec.ValidationError as error:
        raise EdmDistillError(f"the results in this checkpoint are not ours ({error}): measure it again") from error


def with_results(config: CheckpointConfig, results: Sequence[Result]) -> CheckpointConfig:
    """A configuration with these results too; one of the same protocol and sampler as another takes its place."""
    latest = {(r.protocol_sha256, r.sampler): r for r in (*saved_results(config), *results)}
    return replace(config, results=tuple(map(msgspec.to_builtins, latest.values())))


def results_of(path: Path) -> list[Result]:
    """Returns all results of a checkpoint folder, or of a run and its checkpoint: what reports and cards show.

    Raises: EdmDistillError: a file in a run's eval/, or the checkpoint, holds something else.
    """
    folder = checkpoint_in(path)
    own = saved_results(read_config(folder)) if (folder / CONFIG).is_file() else []
    return latest([*own, *read_results(sorted((path / EVAL).glob("*.json")))])


def latest(results: Iterable[Result]) -> list[Result]:
    """Of the results of the same weights by the same protocol and sampler, the last."""
    return list({_key(result): result for result in results}.values())


def _key(result: Result) -> tuple[object, ...]:
    origin = result.provenance
    weights = tuple(origin.get(name) for name in ("method", "recipe_hash", "images_seen"))
    return result.protocol_sha256, result.sampler, weights


def place_to_save_in(source: str | Path) -> Path:
    """Returns the run directory or checkpoint folder, on this disk, that keeps the results of a source.

    Raises: EdmDistillError: it is something else.  CheckpointError: it is damaged, or no checkpoint.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise EdmDistillError(f"--save is for a checkpoint folder or a run, and {source} is neither: use --out")
    read_config(checkpoint_in(path))
    return path


def save_results(place: Path, results: Sequence[Result]) -> None:
    """Keeps results with a checkpoint, and in the run that it belongs to.

    Args:
        place: of place_to_save_in.
    Raises: CheckpointError: the disk refuses.
    """
    folder = checkpoint_in(place)
    write_config(folder, with_results(read_config(folder), results))
    if not (place / RECIPE).is_file():
        return
    for result in results:
        digest = hashlib.sha256(repr(_key(result)).encode()).hexdigest()
        with atomic_write(place / EVAL / f"{result.protocol.name}-{digest:.12}.json") as new:
            new.write_text(results_json([result]) + "\n", encoding="utf-8")
