"""Results of several sources in one table, if their numbers may stand side by side."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edmdistill.checkpoints.config import read_config
from edmdistill.checkpoints.layout import CONFIG, checkpoint_in
from edmdistill.errors import EdmDistillError, counted
from edmdistill.evaluation.feature_set import Features
from edmdistill.evaluation.metrics import find_metric
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.results import (
    Result,
    is_of_raw_weights,
    is_of_teacher,
    load_results,
    read_results,
    results_files,
)
from edmdistill.evaluation.tables import csv_table, distinct_rows, markdown_table, number, sampler_words
from edmdistill.sampling.seeds import format_seeds, parse_seeds

CHOSEN = "balanced", "drawn", "given"
"""Rules by which classes are chosen; beside them, a source may have none, or not say."""


class Row(NamedTuple):
    """A result, and what it is called.

    Attributes:
        source: the run or the checkpoint that holds it, as it was given, or what a file says was measured.
        folder: the run or the checkpoint that holds it; None: a file did.
        of_teacher: measured on the teacher of that generator.
    """

    source: str
    result: Result
    folder: Path | None = None
    of_teacher: bool = False

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.source, self.weights)))

    @property
    def weights(self) -> str:
        """Which of the source's weights were measured; "" where it has no others, as far as is known."""
        images = self.result.provenance.get("images_seen")
        words = ["raw weights"] if is_of_raw_weights(self.result) else []
        words += [] if images is None else [f"{counted(images, 'image')} seen"]
        return "teacher" if self.of_teacher else ", ".join(words)


def read_rows(sources: Sequence[str | Path], seeds: str | None = None) -> list[Row]:
    """Returns the results in files that `eval --out` wrote, in run directories and in checkpoints.

    Args:
        seeds: only results of the samples of these seeds, as in 0-4999.
    Raises: EdmDistillError: a source holds no results, or something else.
    """
    wanted = None if seeds is None else format_seeds(parse_seeds(seeds))
    rows: list[Row] = []
    for source in map(Path, sources):
        results = load_results(source) if source.is_dir() else read_results([source])
        if not results:
            command = f"edmdistill eval {shlex.quote(str(source))} --protocol NAME --save"
            raise EdmDistillError(f"{source} holds no results: measure it with `{command}`")
        if wanted is not None:
            held = sorted({str(result.protocol.seeds) for result in results})
            results = [result for result in results if result.protocol.seeds == wanted]
            if not results:
                raise EdmDistillError(f"{source} has no results of the seeds {wanted}, but of {', '.join(held)}")
        if source.is_dir():
            rows += [_row_of_folder(result, source) for result in results]
        else:
            rows += [Row(str(result.provenance.get("source") or source), result) for result in results]
    return rows


def _row_of_folder(result: Result, folder: Path) -> Row:
    """Returns the row of a folder's result, with the folder's path as it is given, because it may have moved since."""
    checkpoint = checkpoint_in(folder)
    config = read_config(checkpoint) if (checkpoint / CONFIG).is_file() else None
    is_generator = config is not None and config.stage == "generator"
    return Row(str(folder), result, folder, of_teacher=is_generator and is_of_teacher(result))


class Comparison(NamedTuple):
    """Results side by side.

    Attributes:
        metrics: the names of the columns of numbers.
        notes: sentences on what is not known of a number.
    """

    rows: Sequence[Row]
    metrics: Sequence[str]
    notes: Sequence[str]

    def cells(self) -> list[list[str]]:
        """Returns the table; the first row is the head."""
        return [["source", "NFE", "sampler", *self.metrics], *map(self._cells, self._shown)]

    @property
    def _shown(self) -> list[Row]:
        return distinct_rows(self.rows, lambda row: row.result.sampler, self._cells)

    def _cells(self, row: Row) -> list[str]:
        sampler, values = row.result.sampler, map(row.result.metrics.get, self.metrics)
        return [row.name, str(sampler.nfe) if sampler else "-", sampler_words(sampler), *map(_cell, values)]

    def to_markdown(self) -> str:
        """Returns the table in Markdown, and the notes below it."""
        return markdown_table(self.cells(), len(self.metrics), self.notes)

    def to_csv(self) -> str:
        """Returns the table as comma-separated values, the numbers in full."""
        head, *body = self.cells()
        numbers = [[row.result.metrics.get(metric) for metric in self.metrics] for row in self._shown]
        return csv_table([head, *([*cells[:3], *values] for cells, values in zip(body, numbers, strict=True))])

    def to_json(self) -> str:
        """Returns the table as JSON, each row with all that its numbers depend on."""
        rows = [{"name": row.name, "result": row.result} for row in self.rows]
        document = {"schema_version": 1, "metrics": self.metrics, "rows": rows, "notes": self.notes}
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def compare(rows: Sequence[Row]) -> Comparison:
    """Returns results side by side.

    Raises: EdmDistillError: two of them have a metric that was not measured alike; says what differs.
    """
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.result.metrics))
    notes = []
    for metric in metrics:
        having = [row for row in rows if metric in row.result.metrics]
        for a, b in pairwise(having):
            if reasons := differences(a.result.protocol, b.result.protocol, metric):
                raise EdmDistillError(
                    f"{metric} of {a.name} and {metric} of {b.name} cannot stand side by side: they differ in "
                    f"{', '.join(reasons)}; {_advice(a, b)}"
                )
        if len(having) > 1:
            notes += [note for row in having if (note := _unknown(row, metric))]
    notes += [note for a, b in pairwise(rows) if (note := _rounded_otherwise(a, b))]
    return Comparison(rows, metrics, list(dict.fromkeys(notes)))


def _advice(a: Row, b: Row) -> str:
    """Returns what to do about two results that were not measured alike."""
    if a.folder is None or a.folder != b.folder:
        return "measure both alike"
    seeds = a.result.protocol.seeds, b.result.protocol.seeds
    if None not in seeds and seeds[0] != seeds[1]:
        return f"both are of {a.folder}: add --seeds {seeds[0]}, or --seeds {seeds[1]}"
    files = [file for row in (a, b) for file in results_files(a.folder) if row.result in read_results([file])]
    either = " or ".join(map(str, files)) or "a file of `edmdistill eval --out`"
    return f"both are of {a.folder}: give {either} in place of it"


def differences(a: Protocol, b: Protocol, metric: str) -> list[str]:
    """Returns what differs between two protocols, of what moves a metric.

    What one of them does not say, such as the seeds of images from elsewhere, is no difference.
    """
    ours, theirs = (_conditions(protocol, metric) for protocol in (a, b))
    return [
        f"{name} ({_words(a, name, ours[name])} and {_words(b, name, theirs[name])})"
        for name in ours
        if name in theirs and ours[name] != theirs[name] and None not in (ours[name], theirs[name])
    ]


def _conditions(protocol: Protocol, metric: str) -> dict[str, Any]:
    """Returns what moves a metric, by name; None: not said, or without effect."""
    reference = protocol.reference
    conditions = {
        "n": protocol.n,
        "repetitions": protocol.repeat,
        "seeds": protocol.seeds,
        "classes": protocol.labels if protocol.labels in CHOSEN else None,
        "reference": reference and (reference.sha256 or reference.source),
        "rounding": protocol.uint8,
        "decoder": protocol.decoder,
        "likelihood": protocol.likelihood or None,
    }
    used: Mapping[str, str | None] = protocol.weights
    if protocol.features is not None:
        metric_found = find_metric(re.split(r"[\[@]", metric)[0], protocol.features)
        used = {metric_found.features: protocol.weights.get(metric_found.features)}
        if reference is not None and metric_found.metric.reference is Features:
            conditions["real images"] = reference.kept or reference.n
    return conditions | {f"weights of {name}": sha256 for name, sha256 in used.items()}


def _words(protocol: Protocol, name: str, value: object) -> str:
    """Returns a condition in words: of a digest the beginning, and a reference by its name too."""
    digest = re.sub(r"(?<=^[0-9a-f]{8})[0-9a-f]{56}$", "", str(value))
    known = protocol.reference if name == "reference" else None
    return digest if known is None or digest == known.source else f"{known.source} {digest}"


def _unknown(row: Row, metric: str) -> str | None:
    """Returns a sentence on what a result does not say of a metric."""
    protocol = row.result.protocol
    missing = ["seeds"] if protocol.seeds is None and protocol.features is not None else []
    missing += ["classes"] if protocol.labels == "unknown" else []
    return f"Of {row.name}, the {' and '.join(missing)} of {metric} are unknown." if missing else None


def _rounded_otherwise(a: Row, b: Row) -> str | None:
    """Returns a sentence where two results were computed in ways that round differently."""
    ours, theirs = a.result.provenance, b.result.provenance
    devices = ours.get("device"), theirs.get("device")
    which = [f"device ({devices[0]} and {devices[1]})"] if None not in devices and devices[0] != devices[1] else []
    if bool(ours.get("compiled")) != bool(theirs.get("compiled")):
        which.append("compilation")
    return f"{a.name} and {b.name} differ in {', '.join(which)}, so they are rounded differently." if which else None


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)
