"""Results side by side: a table for each protocol, for what was measured otherwise does not compare."""

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
    """Which generator the tables are about: others are called by their recipe and images."""

    recipe_hash: str
    images_seen: int


class ResultTable(NamedTuple):
    """The results of one protocol.

    Attributes:
        rows: of text; the first is the head.
        claim: the generator against the teacher in a sentence; empty unless both were measured.
        curves: the best of the first metric at each NFE, by who was measured.
        metric: the first, as people write it.
    """

    protocol: Protocol
    rows: list[list[str]]
    claim: str
    curves: Mapping[str, Sequence[tuple[int, float]]]
    metric: str

    def to_text(self) -> str:
        """For the terminal."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        shapes = [f"{'<' if i in (0, len(widths) - 1) else '>'}{width}" for i, width in enumerate(widths)]
        lines = ["  ".join(map(format, row, shapes)).rstrip() for row in self.rows]
        return "\n".join([f"Protocol {self.protocol.name}, {self.protocol.n} images.", *lines, self.claim]).rstrip()

    def to_markdown(self) -> str:
        head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in self.rows)
        return "\n".join([head, "|---" * len(self.rows[0]) + "|", *body])

    @property
    def caption(self) -> str:
        """What was measured, and against what."""
        own = self.protocol
        real = f"{own.reference.source} ({own.reference.split}, {own.reference.n} images)" if own.reference else "-"
        if own.features is None:
            return (
                f"Protocol {own.name}, sha256 {own.sha256():.12}: bits per dimension of {real}, classes {own.labels}. "
                "NFE counts the evaluations of the network for an image, in the mean."
            )
        return (
            f"Protocol {own.name}, sha256 {own.sha256():.12}: {own.n} images, seeds {own.seeds}, classes {own.labels}, "
            f"against {real}. NFE counts the evaluations of the network for an image. FD is the Frechet distance of "
            "features: the lower, the better."
        )


def result_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """A table for each protocol, teachers first."""
    hashes = dict.fromkeys(result.protocol_sha256 for result in results)
    return [_table([result for result in results if result.protocol_sha256 == own], generator) for own in hashes]


def sweep_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """A sweep's table for each protocol by which this generator was measured at more than one gamma."""
    own = [result for result in results if result.sampler and _name_of(result, generator) == "generator"]
    # Of one setting, the lowest counts.
    own.sort(key=lambda result: (_nfe(result), _gamma(result), -_first_metric(result)))
    found = {}
    for protocol in dict.fromkeys(result.protocol_sha256 for result in own):
        its = [result for result in own if result.protocol_sha256 == protocol]
        if len({_gamma(result) for result in its}) > 1:
            found[protocol] = sweep_table(its)
    return list(found.values())


def best_gamma_results(results: Sequence[Result]) -> list[Result]:
    """Without those that another gamma makes better in as many evaluations, or no worse before them."""

    def setting(result: Result) -> tuple[object, ...]:
        origin, sampler = result.provenance, result.sampler
        own = sampler and replace(sampler, gamma=None)
        return result.protocol_sha256, origin.get("recipe_hash"), origin.get("images_seen"), own

    best: dict[tuple[object, ...], Result] = {}
    for result in results:
        best[setting(result)] = min(best.get(setting(result), result), result, key=_first_metric)
    return [r for r in results if r.sampler is None or r.sampler.gamma is None or r is best[setting(r)]]


def sweep_table(results: Sequence[Result]) -> ResultTable:
    """Results of one protocol and one network, a row for each metric and gamma, a column for each NFE.

    Its curves are those of the first metric, by gamma; a teacher's, by its solver.
    """
    main = next(iter(results[0].metrics))
    measured = {(_setting(result.sampler), _nfe(result)): result.metrics for result in results}
    settings, steps = (list(dict.fromkeys(column)) for column in zip(*measured, strict=True))
    rows = [["NFE", *map(str, steps), "lowest in"]]
    for metric in results[0].metrics:
        for setting in settings:
            values = {nfe: measured[setting, nfe][metric] for nfe in steps if (setting, nfe) in measured}
            best = str(_lowest(values)[1]) if metric == main else ""
            cells = [_number(values[nfe]) if nfe in values else "-" for nfe in steps]
            rows.append([f"{_heading(metric)}, {setting}", *cells, best])
    value, setting, nfe = min((metrics[main], *at) for at, metrics in measured.items())
    where = f"{nfe} evaluations with {setting}" if nfe > 1 else "1 evaluation"  # in which no gamma plays
    claim = f"{_heading(main)} is lowest in {where}: {_number(value)}."
    curves = {
        setting: [(nfe, measured[setting, nfe][main]) for nfe in sorted(steps) if (setting, nfe) in measured]
        for setting in settings
    }
    return ResultTable(results[0].protocol, rows, claim, curves, _heading(main))


def _table(results: Sequence[Result], generator: GeneratorId) -> ResultTable:
    rows = [(_name_of(result, generator), _nfe(result), result) for result in results]
    rows.sort(key=lambda row: (row[0] != "teacher", row[:2]))
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    main = metrics[0]
    best: dict[str, dict[int, float]] = {}
    for who, nfe, result in rows:
        own = best.setdefault(who, {})
        own[nfe] = min(result.metrics[main], own.get(nfe, math.inf))
    goal, steps = _lowest(best.get("teacher", {0: math.nan}))

    body = [["", "NFE", *map(_heading, metrics), *(["to teacher's best"] if steps else []), "drawn by"]]
    for who, nfe, result in rows:
        values = [_number(result.metrics[metric]) if metric in result.metrics else "-" for metric in metrics]
        ratio = [f"{result.metrics[main] / goal:.2f} x"] if steps else []
        body.append([who, str(nfe or "-"), *values, *ratio, _how(result.sampler)])
    claim = ""
    if steps and "generator" in best:
        value, nfe = _lowest(best["generator"])
        claim = (
            f"In {nfe} {'evaluation' if nfe == 1 else 'evaluations'} the generator's {_heading(main)} is "
            f"{_number(value)}: {value / goal:.2f} times the teacher's best, which is {_number(goal)} in {steps}."
        )
    curves = {who: list(own.items()) for who, own in reversed(best.items()) if 0 not in own}
    if results[0].protocol.features is None:
        curves = {}  # a likelihood's evaluations are what its solver took, and nobody's choice
    return ResultTable(results[0].protocol, body, claim, curves, _heading(main))


def _lowest(values: Mapping[int, float]) -> tuple[float, int]:
    """The lowest value and its NFE."""
    return min((value, nfe) for nfe, value in values.items())


def _name_of(result: Result, generator: GeneratorId) -> str:
    """What was measured, by its provenance."""
    origin = result.provenance
    if result.sampler is None:
        return "images"
    if origin.get("method") is None:
        return "teacher"
    recipe, images = origin.get("recipe_hash"), origin.get("images_seen")
    same = (recipe, images) == generator
    return "generator" if same else f"generator of {images:,} images, recipe {recipe:.8}"


def _nfe(result: Result) -> int:
    return result.sampler.nfe if result.sampler else 0


def _first_metric(result: Result) -> float:
    """The first metric."""
    return next(iter(result.metrics.values()))


def _gamma(result: Result) -> float:
    """Of a teacher, which has none, below all others."""
    return -1.0 if result.sampler is None or result.sampler.gamma is None else result.sampler.gamma


def _setting(sampler: SamplerRecord | None) -> str:
    assert sampler is not None
    return sampler.solver if sampler.gamma is None else f"gamma {sampler.gamma:g}"


def _how(sampler: SamplerRecord | None) -> str:
    if sampler is None:
        return "-"
    words = [_setting(sampler)] if sampler.gamma is None or sampler.nfe > 1 else []  # in one step no gamma plays
    words += [f"guidance {sampler.guidance:g}"] if sampler.guidance != 1 else []
    words += [f"sigma {' '.join(f'{sigma:.3g}' for sigma in sampler.sigmas)}"] if sampler.sigmas else []
    return ", ".join(words)


def _heading(metric: str) -> str:
    """fd_digits@1000 as people write it: digits-FD@1000."""
    return re.sub(r"^fd_([^@]+)", r"\1-FD", metric).replace("_", " ")


def _number(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")
