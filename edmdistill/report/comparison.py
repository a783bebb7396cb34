"""Results side by side as curves by number of evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.compare import Comparison, Row
from edmdistill.evaluation.metrics import loss_of
from edmdistill.evaluation.tables import heading, setting_words
from edmdistill.evaluation.training_seeds import Group, SeedTable
from edmdistill.report.chart import Chart, Curve
from edmdistill.report.curves import powers_of_two
from edmdistill.sampling.spec import SamplerRecord

FOLDERS = re.compile(r"/(?![^{]*})")
"""Between the folders of a path, or of several as in runs/{a/b,c/d}."""


class Line(NamedTuple):
    """The rows of one source, its weights and its settings, which are a curve.

    Attributes:
        name: what tells it from the other lines.
        groups: by NFE; of each metric one at most at each NFE.
    """

    name: str
    groups: Sequence[tuple[int, Group]]

    def curve(self, metric: str, style: int) -> Curve:
        points = [(float(nfe), value) for nfe, group in self.groups if (value := group.mean(metric)) is not None]
        spread = {float(nfe): size for nfe, group in self.groups if (size := group.deviation(metric)) is not None}
        return Curve(self.name, points, spread, style)

    @property
    def folders(self) -> list[Path]:
        """The folders that hold its results."""
        return [row.folder for _, group in self.groups for row in group.rows if row.folder is not None]


def lines_of(table: Comparison | SeedTable) -> list[Line]:
    """Returns the lines of a comparison; rows without a number of evaluations that was asked for are in none."""
    drawn = [group for group in _groups(table) if _nfe(group)]
    sources = short_names([group.source for group in drawn])
    origins: dict[tuple[str, ...], list[Group]] = {}
    for group in drawn:
        row = group.rows[0]
        weights = ("teacher", "") if row.of_teacher else ("", row.weights)
        origins.setdefault((sources[group.source], *weights), []).append(group)
    lines: dict[tuple[str, ...], list[tuple[int, Group]]] = {}
    for origin, groups in origins.items():
        samplers = _told_apart([sampler for group in groups if (sampler := group.rows[0].result.sampler)])
        words = setting_words(samplers)
        for group, sampler in zip(groups, samplers, strict=True):
            facts = *origin, *words(sampler)
            again = 1
            while any(_same_point(group, other) for _, other in lines.get((*facts, _repeated(again)), [])):
                again += 1  # as one file given twice: the table has two rows too
            lines.setdefault((*facts, _repeated(again)), []).append((_nfe(group), group))
    names = distinct_names(list(lines))
    return [
        Line(name, sorted(groups, key=lambda one: one[0])) for name, groups in zip(names, lines.values(), strict=True)
    ]


def charts_by_nfe(table: Comparison | SeedTable, lines: Sequence[Line]) -> list[Chart]:
    """Returns a chart for each metric, in which a line has the same style everywhere.

    Raises: EdmDistillError: there are no lines.
    """
    if not lines:
        raise EdmDistillError(
            "none of these results is of images drawn in a known number of evaluations, over which --plot draws: leave "
            "--plot out"
        )
    charts = []
    for metric in table.metrics:
        curves = [curve for style, line in enumerate(lines) if (curve := line.curve(metric, style)).points]
        x = powers_of_two(curve.points for curve in curves)
        charts += [Chart(f"{heading(metric)} by NFE", curves, x, log=loss_of(metric, 1) > 0)] if curves else []
    return charts


def undrawn(table: Comparison | SeedTable) -> str:
    """Returns a sentence on the rows that are in no line; "" if all are."""
    names = dict.fromkeys(group.name for group in _groups(table) if not _nfe(group))
    return f"Not drawn, as the number of evaluations is not known: {', '.join(names)}." if names else ""


def rows_of(table: Comparison | SeedTable) -> list[Row]:
    return [row for group in _groups(table) for row in group.rows]


def _groups(table: Comparison | SeedTable) -> Sequence[Group]:
    return table.groups if isinstance(table, SeedTable) else [Group([row], []) for row in table.rows]


def _nfe(group: Group) -> int:
    """Returns the number of evaluations; 0 if it is not known, or as of a likelihood the solver's choice."""
    result = group.rows[0].result
    return result.sampler.nfe if result.sampler and result.protocol.features is not None else 0


def _told_apart(samplers: Sequence[SamplerRecord]) -> list[SamplerRecord]:
    """Returns samplers without the noise levels of those that differ from all others in something else."""
    levels: dict[SamplerRecord, set[tuple[float, ...] | None]] = {}
    for sampler in samplers:
        levels.setdefault(replace(sampler, sigmas=None), set()).add(sampler.sigmas)
    return [plain if len(levels[plain := replace(each, sigmas=None)]) == 1 else each for each in samplers]


def _same_point(a: Group, b: Group) -> bool:
    ours, theirs = (group.rows[0].result.metrics.keys() for group in (a, b))
    return _nfe(a) == _nfe(b) and not ours.isdisjoint(theirs)


def _repeated(times: int) -> str:
    return f"#{times}" if times > 1 else ""


def distinct_names(facts: Sequence[Sequence[str]]) -> list[str]:
    """Returns names of things, each of those of its facts that tell it from others, from the first on.

    Args:
        facts: as many of each; "" where there is nothing to say. The first one names what nothing tells from others.
    """
    names = []
    for own in facts:
        words, rivals = [], [other for other in facts if other is not own]
        for i, fact in enumerate(own):
            alike = [other for other in rivals if other[i] == fact]
            words += [fact] if fact and len(alike) < len(rivals) else []
            rivals = alike
        names.append(", ".join(words) or own[0])
    return names


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns short names of paths by their ends, each of as few folders as tell it from the others.

    Folders that all end with are left out: runs/a/generator and runs/b/generator are a and b.
    """
    parts = {path: list(filter(None, FOLDERS.split(path))) or [path] for path in paths}
    while len(parts) > 1 and min(map(len, parts.values())) > 1 and len({part[-1] for part in parts.values()}) == 1:
        parts = {path: part[:-1] for path, part in parts.items()}
    ends = {path: ["/".join(part[-size:]) for size in range(1, len(part) + 1)] for path, part in parts.items()}
    taken = [end for each in ends.values() for end in each]
    return {path: next((end for end in each if taken.count(end) == 1), path) for path, each in ends.items()}
