"""Results of runs that differ in their training seed alone: mean and standard deviation over the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import msgspec

from edmdistill.checkpoints.layout import RECIPE, RUN
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.compare import Comparison, Row
from edmdistill.evaluation.tables import csv_table, distinct_rows, markdown_table, number, sampler_words

MEANS = "Mean ± standard deviation over runs that differ in training.seed alone."


class Group(NamedTuple):
    """Results of runs of several training seeds, each measured alike.

    Attributes:
        rows: one for each run.
        seeds: of the runs; empty for what is no run.
    """

    rows: Sequence[Row]
    seeds: Sequence[int]

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.source, self.rows[0].weights)))

    @property
    def source(self) -> str:
        """The source of the only one, or of all as a shell has them: runs/a-{0,1,2}."""
        first, *others = (row.source for row in self.rows)
        if not others:
            return first
        folders = [str(row.folder) for row in self.rows]
        start = _shared_start(folders)
        end = _shared_start([folder[len(start) :][::-1] for folder in folders])[::-1]
        middles = ",".join(folder[len(start) : len(folder) - len(end)] for folder in folders)
        return f"{start}{{{middles}}}{end}"

    def mean(self, metric: str) -> float | None:
        """Returns the mean over the runs; None: they were not measured by it."""
        values = self._values(metric)
        return fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Returns the standard deviation, of n - 1 degrees of freedom; None: there are fewer than two numbers."""
        values = self._values(metric)
        return stdev(values) if len(values) > 1 else None

    def _values(self, metric: str) -> list[float]:
        return [row.result.metrics[metric] for row in self.rows if metric in row.result.metrics]


class SeedTable(NamedTuple):
    """Groups side by side; metrics and notes are a Comparison's."""

    groups: Sequence[Group]
    metrics: Sequence[str]
    notes: Sequence[str]

    def cells(self) -> list[list[str]]:
        """Returns the table of means and standard deviations; the first row is the head."""
        return [["source", "runs", "NFE", "sampler", *self.metrics], *map(self._cells, self._shown)]

    def to_markdown(self) -> str:
        """Returns the table in Markdown, and the notes below it."""
        return markdown_table(self.cells(), len(self.metrics), [MEANS, *self.notes])

    def to_csv(self) -> str:
        """Returns the table as comma-separated values, the numbers in full: mean, deviation of each metric."""
        names = [name for metric in self.metrics for name in (metric, f"{metric} deviation")]
        rows: list[list[object]] = [["source", "runs", "NFE", "sampler", *names]]
        for group in self._shown:
            numbers = [value for metric in self.metrics for value in (group.mean(metric), group.deviation(metric))]
            rows.append([*self._about(group), *numbers])
        return csv_table(rows)

    def to_json(self) -> str:
        """Returns the table as JSON, with the results of each run."""
        rows = [
            {
                "name": group.name,
                "seeds": group.seeds,
                "mean": {metric: group.mean(metric) for metric in self.metrics},
                "deviation": {metric: group.deviation(metric) for metric in self.metrics},
                "runs": [{"name": row.name, "result": row.result} for row in group.rows],
            }
            for group in self.groups
        ]
        document = {"schema_version": 1, "metrics": self.metrics, "rows": rows, "notes": self.notes}
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()

    @property
    def _shown(self) -> list[Group]:
        return distinct_rows(self.groups, lambda group: group.rows[0].result.sampler, self._cells)

    def _cells(self, group: Group) -> list[str]:
        return [*self._about(group), *(_cell(group, metric) for metric in self.metrics)]

    @staticmethod
    def _about(group: Group) -> list[str]:
        sampler = group.rows[0].result.sampler
        return [group.name, str(len(group.rows)), str(sampler.nfe) if sampler else "-", sampler_words(sampler)]


def over_seeds(table: Comparison) -> SeedTable:
    """Returns the rows of a comparison, with one for all runs that differ in their training seed alone.

    Those have the same recipe but for `training.seed`, teacher, data, images seen, sampler and protocol. What several
    runs hold of their teacher is one row. Other rows stand for themselves.

    Raises: EdmDistillError: two of them have the same seed too, and so are copies.
    """
    groups: dict[Any, dict[Any, Row]] = {}
    for row in table.rows:
        setting, seed = _setting(row)
        rows = groups.setdefault(setting, {})
        if seed is not None and seed in rows:
            raise EdmDistillError(
                f"{rows[seed].folder} and {row.folder} are runs of one recipe and one training.seed, {seed}, which "
                "would count twice: leave one out"
            )
        rows.setdefault(seed, row)
    made = [Group(list(rows.values()), [seed for seed in rows if seed is not None]) for rows in groups.values()]
    return SeedTable(made, table.metrics, table.notes)


def _setting(row: Row) -> tuple[object, int | None]:
    """Returns what a result depends on but the training seed, and that seed; None for what is no run's own."""
    result = row.result
    files = [] if row.folder is None else [row.folder / RECIPE, row.folder / RUN]
    if not files or not all(file.is_file() for file in files):
        return id(row), None
    if row.of_teacher:
        return (result.provenance.get("source_sha256"), result.sampler, result.protocol_sha256), None
    recipe, run = map(_read, files)
    training = dict(recipe["training"])
    seed = training.pop("seed")
    recipe = {name: table for name, table in recipe.items() if name != "evaluation"} | {"training": training}
    depends = json.dumps([recipe, run, result.provenance.get("images_seen")], sort_keys=True)
    return (depends, result.sampler, result.protocol_sha256), seed


def _read(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise EdmDistillError(f"{file} cannot be read ({error}): copy it from where it is whole") from error


def _shared_start(words: Sequence[str]) -> str:
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in columns)


def _cell(group: Group, metric: str) -> str:
    mean, deviation = group.mean(metric), group.deviation(metric)
    if mean is None:
        return "-"
    shown = number(mean)
    if deviation is None:
        return shown
    digits = shown.partition(".")[2]
    return f"{shown} ± {number(deviation) if 'e' in shown else f'{deviation:.{len(digits)}f}'}"
