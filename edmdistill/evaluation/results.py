"""Results: metrics that carry with them how they were made; and where they are kept, with what was measured.

A run keeps them in RUN/eval, a file each, where they outlive the checkpoint that training replaces. Those of the
checkpoint as it is now are in its config.json too, and are published with the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import force_setattr, replace

from edmdistill.atomic import atomic_write, expanded, unwritable
from edmdistill.checkpoints.config import CheckpointConfig, read_config, write_config
from edmdistill.checkpoints.layout import CONFIG, TOML, checkpoint_in
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import Protocol
from edmdistill.sampling.spec import SamplerRecord
from edmdistill.trigflow import written_levels

SCHEMA_VERSION = 2
EVAL = "eval"
"""A run's folder of results."""


class Origin(TypedDict, total=False):
    """What was measured, with which versions, and what decides the rounding; keys that do not apply are absent."""

    source: str | None
    method: str | None
    recipe_hash: str | None
    images_seen: int | None
    provenance: dict[str, Any]
    """Of a generator: the Provenance of its checkpoint."""
    source_sha256: str
    weights: str
    """raw: not the average that a run publishes."""
    edmdistill: str
    revision: str | None
    torch: str
    device: str
    compiled: bool


class Result(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics, and all that it takes to judge or repeat them.

    Where the number of images is not the protocol's standard, the name of a metric says so: fd_digits@1000.
    """

    schema_version: int = SCHEMA_VERSION
    metrics: Annotated[dict[str, float], Meta(min_length=1)]
    repetitions: tuple[dict[str, float], ...] = ()
    """The metrics of each repetition, of which `metrics` are the means; empty if there is one."""
    protocol: Protocol
    protocol_sha256: str
    sampler: SamplerRecord | None
    """None: the images were there already, and not known to be drawn by `sample`."""
    provenance: Origin

    def __post_init__(self) -> None:
        if len(self.repetitions) == 1 or any(one.keys() != self.metrics.keys() for one in self.repetitions):
            raise ValueError("repetitions must be several, each of the same metrics")
        if self.sampler is not None and self.sampler.sigmas is not None:
            written = replace(self.sampler, sigmas=written_levels(self.sampler.sigmas))
            force_setattr(self, "sampler", written)

    def to_json(self) -> str:
        """Returns the result as a JSON document, which `read_results` and `edmdistill compare` read."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def results_json(results: Sequence[Result]) -> str:
    """Results as one JSON document."""
    document = msgspec.json.encode({"schema_version": SCHEMA_VERSION, "results": results})
    return msgspec.json.format(document, indent=2).decode()


def results_table(results: Sequence[Result]) -> str:
    """Results of one protocol as lines of text."""
    protocol = results[0].protocol
    reference = protocol.reference
    assert reference is not None
    size = "" if reference.n is None else f", {reference.n}"
    where = f"{reference.source} ({reference.split}{size})"
    against = f"{protocol.n} images against {where}" if protocol.features else f"bits per dimension of {where}"
    names = ("NFE", *results[0].metrics)
    rows = [names]
    for result in results:
        nfe = str(result.sampler.nfe) if result.sampler else "-"
        rows += [(f"{nfe}{name}", *(f"{value:.4g}" for value in values)) for name, values in _rows_of(result).items()]
    lines = [
        "".join(f"{cell:>{max(18, len(name) + 2)}}" for cell, name in zip(row, names, strict=True)) for row in rows
    ]
    if protocol.repeat > 1:
        lines.append(
            f"Means of {protocol.repeat} repetitions of {protocol.n} images, seeds {protocol.seeds}. EDM's papers give "
            "the minimum of three."
        )
    return "\n".join([f"protocol {protocol.name}: {against}", *lines])


def _rows_of(result: Result) -> dict[str, Sequence[float]]:
    """Returns the metrics of a result; of several repetitions their means, minima and standard deviations."""
    columns = [[one[name] for one in result.repetitions] for name in result.metrics]
    rows: dict[str, Sequence[float]] = {"": list(result.metrics.values())}
    if result.repetitions:
        rows |= {" min": [min(column) for column in columns], " std": [stdev(column) for column in columns]}
    return rows


def read_results(
    files: Iterable[Path], advice: str = "give what edmdistill eval --out wrote, or a run that was measured"
) -> list[Result]:
    """Returns the results that `edmdistill eval --out` or `Result.to_json` wrote.

    Args:
        advice: on a file that is none; the end of a sentence.
    Raises: EdmDistillError: a file holds other things.
    """
    results: list[Result] = []
    for file in files:
        try:
            document = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
            some = [document] if "metrics" in document else document["results"]
            results += msgspec.convert(some, list[Result])
        except (OSError, KeyError, msgspec.MsgspecError) as error:
            match error:
                case FileNotFoundError():
                    reason = "it does not exist"
                case KeyError():
                    reason = "it has no list of them"
                case _:
                    reason = getattr(error, "strerror", None) or str(error)
            raise EdmDistillError(f"{file} holds no results ({reason}): {advice}") from error
    return results


def results_in_config(config: CheckpointConfig) -> list[Result]:
    """Returns the results in a configuration.  Raises: EdmDistillError: they are not what we write."""
    try:
        return msgspec.convert(config.results, list[Result])
    except msgspec.ValidationError as error:
        raise EdmDistillError(
            f"the results in this checkpoint cannot be read ({error}): measure it again by edmdistill eval --save, "
            "which replaces them"
        ) from error


def _result_or_none(stored: dict[str, Any]) -> Result | None:
    try:
        return msgspec.convert(stored, Result)
    except msgspec.ValidationError:
        return None


def add_results(config: CheckpointConfig, results: Sequence[Result]) -> CheckpointConfig:
    """Returns a configuration with these results, each in place of one of the same protocol and sampler.

    What is there and no result, which an earlier version may have written, is left out: nothing else reads it.
    """
    readable = filter(None, map(_result_or_none, config.results))
    latest = {(r.protocol_sha256, r.sampler): r for r in (*readable, *results)}
    return replace(config, results=tuple(map(msgspec.to_builtins, latest.values())))


def load_results(path: Path) -> list[Result]:
    """Returns all results of a checkpoint folder, or of a run and its checkpoint: what reports and cards show.

    Those of a run's raw weights are none of them: nobody gets these weights.
    Raises: EdmDistillError: a file in a run's eval/, or the checkpoint, holds something else.
    """
    folder = checkpoint_in(path)
    stored = results_in_config(read_config(folder)) if (folder / CONFIG).is_file() else []
    results = [*stored, *read_results(results_files(path), "remove it, and measure again by edmdistill eval --save")]
    return latest_results(result for result in results if not is_of_raw_weights(result))


def results_files(path: Path) -> list[Path]:
    """Returns the files of results in a run."""
    return sorted((path / EVAL).glob("*.json"))


def is_of_raw_weights(result: Result) -> bool:
    """Returns whether a result was measured on a run's raw weights, not on the average that it publishes."""
    return result.provenance.get("weights") == "raw"


def is_of_teacher(result: Result) -> bool:
    """Returns whether a result was measured on a teacher: a network, and of no method."""
    return result.sampler is not None and result.provenance.get("method") is None


def latest_results(results: Iterable[Result]) -> list[Result]:
    """Returns the last result of the same weights by the same protocol and sampler, of each."""
    return list({_key(result): result for result in results}.values())


def _key(result: Result) -> tuple[object, ...]:
    origin = result.provenance
    weights = tuple(origin.get(name) for name in ("method", "recipe_hash", "images_seen", "source_sha256"))
    return result.protocol_sha256, result.sampler, weights


def find_results_folder(source: str | Path) -> Path:
    """Returns the run directory or checkpoint folder, on this disk, that keeps the results of a source.

    Raises: EdmDistillError: it is something else, or may not be written.  CheckpointError: it is damaged, or no
        checkpoint.
    """
    path = expanded(source)
    if not path.is_dir():
        raise EdmDistillError(f"--save is for a checkpoint folder or a run, but {source} is no folder here: use --out")
    folder = checkpoint_in(path)
    read_config(folder)
    for file in (folder / CONFIG, path / EVAL / "results.json"):
        if (refusing := unwritable(file)) is not None:
            raise EdmDistillError(f"--save writes in {refusing}, where this user may not write: use --out")
    return path


def save_results(place: Path, results: Sequence[Result]) -> None:
    """Keeps results with a checkpoint, and in the run that it belongs to.

    Args:
        place: of find_results_folder.
    Raises: CheckpointError: the disk refuses.
    """
    folder = checkpoint_in(place)
    write_config(folder, add_results(read_config(folder), results))
    if not (place / TOML).is_file():
        return
    for result in results:
        digest = hashlib.sha256(repr(_key(result)).encode()).hexdigest()
        with atomic_write(place / EVAL / f"{result.protocol.name}-{digest:.12}.json") as new:
            new.write_text(results_json([result]) + "\n", encoding="utf-8")
