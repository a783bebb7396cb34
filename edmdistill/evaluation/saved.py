"""Results inside a checkpoint's config.json, where they stay with the weights that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edmdistill.checkpoints.store import CheckpointConfig, checkpoint_in, read_config, write_config
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import Result


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


def checkpoint_to_save_in(source: str | Path) -> Path:
    """The folder of a checkpoint of ours on this disk, or of a run's.

    Raises: EdmDistillError: it is something else.  CheckpointError: it is damaged, or no checkpoint.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise EdmDistillError(f"--save is for a checkpoint folder or a run, and {source} is neither: use --out")
    folder = checkpoint_in(path)
    read_config(folder)
    return folder


def save_results(folder: Path, results: Sequence[Result]) -> None:
    """Puts results into a checkpoint.  Raises: CheckpointError: the disk refuses."""
    write_config(folder, with_results(read_config(folder), results))
