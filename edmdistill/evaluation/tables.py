"""Results side by side: a table for each protocol, because results of different protocols do not compare."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from edmdistill.checkpoints.documents import markdown
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.results import Result
from edmdistill.sampling.spec import SamplerRecord


class GeneratorId(NamedTuple):
    """The generator that tables are about; others are named by their recipe and images seen."""

    recipe_hash: str
    images_seen: int


class ResultTable(NamedTuple):
    """The results of one protocol.

    Attributes:
        rows: cells of text; the first row is the head.
        claim: compares the generator with the teacher in a sentence; empty unless both were measured.
        curves: the best value of the first metric at each NFE, by name.
        metric: the first metric, as shown to users.
    """

    protocol: Protocol
    rows: list[list[str]]
    claim: str
    curves: Mapping[str, Sequence[tuple[int, float]]]
    metric: str

    def to_text(self) -> str:
        """Returns the table for a terminal."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        shapes = [f"{'<' if i in (0, len(widths) - 1) else '>'}{width}" for i, width in enumerate(widths)]
        lines = ["  ".join(map(format, row, shapes)).rstrip() for row in self.rows]
        return "\n".join([f"Protocol {self.protocol.name}, {self.protocol.n} images.", *lines, self.claim]).rstrip()

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in self.rows)
        return "\n".join([head, "|---" * len(self.rows[0]) + "|", *body])

    @property
    def caption(self) -> str:
        """Says what was measured, and against what."""
        protocol, sha256 = self.protocol, f"{self.protocol.sha256():.12}"
        reference = protocol.reference
        real = f"{reference.source} ({reference.split}, {reference.n} images)" if reference else "-"
        if protocol.features is None:
            return (
                f"Protocol {protocol.name}, sha256 {sha256}: bits per dimension of {real}, classes {protocol.labels}. "
                "NFE is the mean number of network evaluations per image."
            )
        return (
            f"Protocol {protocol.name}, sha256 {sha256}: {protocol.n} images, seeds {protocol.seeds or 'unknown'}, "
            f"classes {protocol.labels}, against {real}. NFE is the number of network evaluations per image. FD is the "
            "Frechet distance between features; lower is better."
        )


def result_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """Returns a table for each protocol, teachers first."""
    hashes = dict.fromkeys(result.protocol_sha256 for result in results)
    return [_table([result for result in results if result.protocol_sha256 == sha256], generator) for sha256 in hashes]


def sweep_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """Returns a sweep_table for each protocol by which this generator was measured at more than one gamma."""
    measured = [result for result in results if result.sampler and _name_of(result, generator) == "generator"]
    # sweep_table keeps the last result of a setting, so the lowest comes last.
    measured.sort(key=lambda result: (_nfe(result), _gamma(result), -_first_metric(result)))
    by_protocol: dict[str, list[Result]] = {}
    for result in measured:
        by_protocol.setdefault(result.protocol_sha256, []).append(result)
    return [sweep_table(group) for group in by_protocol.values() if len(set(map(_gamma, group))) > 1]


def best_gamma_results(results: Sequence[Result]) -> list[Result]:
    """Returns the results without those that another gamma improves at the same NFE, or equals earlier in the list."""

    def setting(result: Result) -> tuple[object, ...]:
        origin, sampler = result.provenance, result.sampler
        others = sampler and replace(sampler, gamma=None)
        return result.protocol_sha256, origin.get("recipe_hash"), origin.get("images_seen"), others

    best: dict[tuple[object, ...], Result] = {}
    for result in results:
        best[setting(result)] = min(best.get(setting(result), result), result, key=_first_metric)
    return [r for r in results if r.sampler is None or r.sampler.gamma is None or r is best[setting(r)]]


def sweep_table(results: Sequence[Result]) -> ResultTable:
    """Returns a table of one network by one protocol, with a row for each metric and gamma, a column for each NFE.

    The curves are of the first metric, by gamma, or by solver for a teacher.
    """
    main = next(iter(results[0].metrics))
    measured = {(_setting(result.sampler), _nfe(result)): result.metrics for result in results}
    settings, steps = (list(dict.fromkeys(column)) for column in zip(*measured, strict=True))
    rows = [["NFE", *map(str, steps), "best NFE"]]
    for metric in results[0].metrics:
        for setting in settings:
            values = {nfe: measured[setting, nfe][metric] for nfe in steps if (setting, nfe) in measured}
            best = str(_lowest(values)[1]) if metric == main else ""
            cells = [_number(values[nfe]) if nfe in values else "-" for nfe in steps]
            rows.append([f"{_heading(metric)}, {setting}", *cells, best])
    value, setting, nfe = min((metrics[main], *at) for at, metrics in measured.items())
    where = f"{nfe} evaluations, {setting}" if nfe > 1 else "1 evaluation"  # where gamma has no effect
    claim = f"{_heading(main)} is lowest with {where}: {_number(value)}."
    curves = {
        setting: [(nfe, measured[setting, nfe][main]) for nfe in sorted(steps) if (setting, nfe) in measured]
        for setting in settings
    }
    return ResultTable(results[0].protocol, rows, claim, curves, _heading(main))


def _table(results: Sequence[Result], generator: GeneratorId) -> ResultTable:
    """Returns the table of one protocol."""
    rows = [(_name_of(result, generator), _nfe(result), result) for result in results]
    rows.sort(key=lambda row: (row[0] != "teacher", row[:2]))
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    main = metrics[0]
    best: dict[str, dict[int, float]] = {}
    for name, nfe, result in rows:
        curve = best.setdefault(name, {})
        curve[nfe] = min(result.metrics[main], curve.get(nfe, math.inf))
    goal, steps = _lowest(best.get("teacher", {0: math.nan}))

    body = [["", "NFE", *map(_heading, metrics), *(["vs teacher's best"] if steps else []), "sampler"]]
    for name, nfe, result in rows:
        values = [_number(result.metrics[metric]) if metric in result.metrics else "-" for metric in metrics]
        ratio = [f"{result.metrics[main] / goal:.2f} x"] if steps else []
        body.append([name, str(nfe or "-"), *values, *ratio, _how(result.sampler)])
    claim = ""
    if steps and "generator" in best:
        value, nfe = _lowest(best["generator"])
        claim = (
            f"With {nfe} {'evaluation' if nfe == 1 else 'evaluations'} the generator reaches {_heading(main)} "
            f"{_number(value)}, {value / goal:.2f} times the teacher's best of {_number(goal)} with {steps}."
        )
    curves = {name: list(curve.items()) for name, curve in reversed(best.items()) if 0 not in curve}
    if results[0].protocol.features is None:
        curves = {}  # the solver chooses the evaluations of a likelihood
    return ResultTable(results[0].protocol, body, claim, curves, _heading(main))


def _lowest(values: Mapping[int, float]) -> tuple[float, int]:
    """Returns the lowest value and its NFE."""
    return min((value, nfe) for nfe, value in values.items())


def _name_of(result: Result, generator: GeneratorId) -> str:
    """Returns the name of what was measured, from its provenance."""
    origin = result.provenance
    if result.sampler is None:
        return "images"
    if origin.get("method") is None:
        return "teacher"
    recipe, images = origin.get("recipe_hash"), origin.get("images_seen")
    same = (recipe, images) == generator
    return "generator" if same else f"generator at {images:,} images, recipe {recipe:.8}"


def _nfe(result: Result) -> int:
    return result.sampler.nfe if result.sampler else 0


def _first_metric(result: Result) -> float:
    """Returns the first metric."""
    return next(iter(result.metrics.values()))


def _gamma(result: Result) -> float:
    """Returns gamma; -1, below all others, for a teacher, which has none."""
    return -1.0 if result.sampler is None or result.sampler.gamma is None else result.sampler.gamma


def _setting(sampler: SamplerRecord | None) -> str:
    assert sampler is not None
    return sampler.solver if sampler.gamma is None else f"gamma {sampler.gamma:g}"


def _how(sampler: SamplerRecord | None) -> str:
    if sampler is None:
        return "-"
    words = [_setting(sampler)] if sampler.gamma is None or sampler.nfe > 1 else []  # gamma has no effect in one step
    words += [f"guidance {sampler.guidance:g}"] if sampler.guidance != 1 else []
    words += [f"sigma {' '.join(f'{sigma:.3g}' for sigma in sampler.sigmas)}"] if sampler.sigmas else []
    return ", ".join(words)


def _heading(metric: str) -> str:
    """Returns fd_digits@1000 as digits-FD@1000."""
    return re.sub(r"^fd_([^@]+)", r"\1-FD", metric).replace("_", " ")


def _number(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")
