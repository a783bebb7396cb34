"""Results side by side: a table for each protocol, because results of different protocols do not compare."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from msgspec import UNSET
from msgspec.structs import replace

from edmdistill.checkpoints.documents import markdown
from edmdistill.errors import counted
from edmdistill.evaluation.metrics import loss_of
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.results import Result, is_of_raw_weights, is_of_teacher
from edmdistill.sampling.spec import SamplerRecord

T = TypeVar("T")

MOST_DIGITS = 8
"""Digits of a noise level at most: what differs by less is rounding."""


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
        times = f", means of {self.protocol.repeat} repetitions" if self.protocol.repeat > 1 else ""
        head = f"Protocol {self.protocol.name}, {self.protocol.n} images{times}."
        return "\n".join([head, *lines, self.claim]).rstrip()

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        return markdown_table(self.rows)

    @property
    def caption(self) -> str:
        return caption(self.protocol)


def caption(protocol: Protocol) -> str:
    """Says what was measured, and against what."""
    sha256 = f"{protocol.sha256():.12}"
    reference = protocol.reference
    real = "-"
    if reference:
        size = "" if reference.n is None else f", {counted(reference.n, 'image')}"
        real = f"{reference.source} ({reference.split}{size})"
    times = f"means of {protocol.repeat} times " if protocol.repeat > 1 else ""
    if protocol.features is None:
        return (
            f"Protocol {protocol.name}, sha256 {sha256}: bits per dimension of {real}, classes {protocol.labels}. "
            "NFE is the mean number of network evaluations per image."
        )
    return (
        f"Protocol {protocol.name}, sha256 {sha256}: {times}{protocol.n} images, seeds "
        f"{protocol.seeds or 'unknown'}, "
        f"classes {protocol.labels}, against {real}. NFE is the number of network evaluations per image. FD and "
        "FID are Frechet distances between features; lower is better."
    )


def markdown_table(rows: Sequence[Sequence[str]], numbers: int = 0, notes: Sequence[str] = ()) -> str:
    """Returns a table in Markdown, and the notes below it.

    Args:
        rows: cells of text; the first row is the head.
        numbers: how many of the last columns are aligned as numbers.
    """
    head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in rows)
    rule = "|---" * (len(rows[0]) - numbers) + "|---:" * numbers + "|"
    return "\n".join([head, rule, *body, *(f"\n{note}" for note in notes)])


def distinct_rows(
    rows: Sequence[T], sampler: Callable[[T], SamplerRecord | None], cells: Callable[[T], list[str]]
) -> list[T]:
    """Returns the rows of a table without those of one step that repeat another: there gamma plays no part.

    Args:
        sampler: of a row.
        cells: of a row, as they are shown.
    """
    shown: dict[object, T] = {}
    for i, row in enumerate(rows):
        drawn = sampler(row)
        shown.setdefault(tuple(cells(row)) if drawn is not None and drawn.nfe == 1 else i, row)
    return list(shown.values())


def csv_table(rows: Iterable[Sequence[object]]) -> str:
    """Returns a table as comma-separated values; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def result_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """Returns a table for each protocol, teachers first."""
    hashes = dict.fromkeys(result.protocol_sha256 for result in results)
    return [_table([result for result in results if result.protocol_sha256 == sha256], generator) for sha256 in hashes]


def sweep_tables(results: Sequence[Result], generator: GeneratorId) -> list[ResultTable]:
    """Returns a sweep_table for each protocol by which this generator was measured at several settings.

    Gamma, guidance, solver, churn or dtype differ between them.
    """
    measured = [result for result in results if result.sampler and _name_of(result, generator) == "generator"]
    # sweep_table keeps the last result of a setting, so the best comes last.
    measured.sort(key=lambda result: (_nfe(result), _gamma(result), -_first_loss(result)))
    by_protocol: dict[str, list[Result]] = {}
    for result in measured:
        by_protocol.setdefault(result.protocol_sha256, []).append(result)
    return [
        sweep_table(group)
        for group in by_protocol.values()
        if len({replace(result.sampler, nfe=0, sigmas=None) for result in group if result.sampler}) > 1
    ]


def best_gamma_results(results: Sequence[Result]) -> list[Result]:
    """Returns the results without those that another gamma improves at the same NFE, or equals earlier in the list."""

    def setting(result: Result) -> tuple[object, ...]:
        origin, sampler = result.provenance, result.sampler
        others = sampler and replace(sampler, gamma=None)
        weights = origin.get("recipe_hash"), origin.get("images_seen"), is_of_raw_weights(result)
        return result.protocol_sha256, weights, others

    best: dict[tuple[object, ...], Result] = {}
    for result in results:
        best[setting(result)] = min(best.get(setting(result), result), result, key=_first_loss)
    return [r for r in results if r.sampler is None or r.sampler.gamma is None or r is best[setting(r)]]


def sweep_table(results: Sequence[Result]) -> ResultTable:
    """Returns a table of one network by one protocol, with a row for each metric and setting, a column for each NFE.

    A setting is a gamma, or a teacher's solver, and what varies of guidance, churn, dtype and, at one NFE, noise
    levels. The curves are of the first metric, by setting.
    """
    main = next(iter(results[0].metrics))
    words = setting_words([result.sampler for result in results if result.sampler])
    measured = {
        (", ".join(filter(None, words(result.sampler))), _nfe(result)): result.metrics
        for result in results
        if result.sampler
    }
    settings, steps = (list(dict.fromkeys(column)) for column in zip(*measured, strict=True))
    rows = [["NFE", *map(str, steps), "best NFE"]]
    for metric in results[0].metrics:
        for setting in settings:
            values = {nfe: measured[setting, nfe][metric] for nfe in steps if (setting, nfe) in measured}
            best = str(_best(values, main)[1]) if metric == main else ""
            cells = [number(values[nfe]) if nfe in values else "-" for nfe in steps]
            rows.append([f"{heading(metric)}, {setting}", *cells, best])
    setting, nfe = min(measured, key=lambda at: (loss_of(main, measured[at][main]), at))
    plain = nfe == 1 and not setting.partition(", ")[2]  # where gamma has no effect
    where = counted(nfe, "evaluation") + ("" if plain else f", {setting}")
    superlative = "lowest" if loss_of(main, 1) > 0 else "highest"
    claim = f"{heading(main)} is {superlative} with {where}: {number(measured[setting, nfe][main])}."
    curves = {
        setting: [(nfe, measured[setting, nfe][main]) for nfe in sorted(steps) if (setting, nfe) in measured]
        for setting in settings
    }
    return ResultTable(results[0].protocol, rows, claim, curves, heading(main))


def _table(results: Sequence[Result], generator: GeneratorId) -> ResultTable:
    """Returns the table of one protocol."""
    rows = [(_name_of(result, generator), _nfe(result), result) for result in results]
    rows.sort(key=lambda row: (row[0] != "teacher", row[:2]))
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    main = metrics[0]
    best: dict[str, dict[int, float]] = {}
    for name, nfe, result in rows:
        curve = best.setdefault(name, {})
        value = result.metrics[main]
        curve[nfe] = min(value, curve.get(nfe, value), key=partial(loss_of, main))
    goal, steps = _best(best.get("teacher", {0: math.nan}), main)

    def cells(row: tuple[str, int, Result]) -> list[str]:
        name, nfe, result = row
        values = [number(result.metrics[metric]) if metric in result.metrics else "-" for metric in metrics]
        ratio = [f"{result.metrics[main] / goal:.2f} x"] if steps else []
        return [name, str(nfe or "-"), *values, *ratio, sampler_words(result.sampler)]

    body = [["", "NFE", *map(heading, metrics), *(["vs teacher's best"] if steps else []), "sampler"]]
    body += map(cells, distinct_rows(rows, lambda row: row[2].sampler, cells))
    claim = ""
    if steps and "generator" in best:
        value, nfe = _best(best["generator"], main)
        claim = (
            f"With {counted(nfe, 'evaluation')} the generator reaches {heading(main)} "
            f"{number(value)}, {value / goal:.2f} times the teacher's best of {number(goal)} with {steps}."
        )
    curves = {name: list(curve.items()) for name, curve in reversed(best.items()) if 0 not in curve}
    if results[0].protocol.features is None:
        curves = {}  # the solver chooses the evaluations of a likelihood
    return ResultTable(results[0].protocol, body, claim, curves, heading(main))


def _best(values: Mapping[int, float], metric: str) -> tuple[float, int]:
    """Returns the best value of a metric and its NFE."""
    nfe = min(values, key=lambda nfe: (loss_of(metric, values[nfe]), nfe))
    return values[nfe], nfe


def _name_of(result: Result, generator: GeneratorId) -> str:
    """Returns the name of what was measured, from its provenance."""
    origin = result.provenance
    recipe, images = origin.get("recipe_hash"), origin.get("images_seen")
    if result.sampler is None:
        return "images"
    if is_of_raw_weights(result):
        return f"raw weights at {counted(images, 'image')}" if images is not None else "raw weights"
    if is_of_teacher(result):
        return "teacher"
    if (recipe or "", images or 0) == generator:  # a converted generator has neither
        return "generator"
    at = f" at {counted(images, 'image')}" if images is not None else ""
    return f"generator{at}, recipe {recipe:.8}" if recipe else f"another generator{at}"


def _nfe(result: Result) -> int:
    return result.sampler.nfe if result.sampler else 0


def _first_loss(result: Result) -> float:
    """Returns the first metric, as a number that is lower for a better one."""
    return loss_of(*next(iter(result.metrics.items())))


def _gamma(result: Result) -> float:
    """Returns gamma; -1, below all others, for a teacher, which has none."""
    return -1.0 if result.sampler is None or result.sampler.gamma is None else result.sampler.gamma


def _setting(sampler: SamplerRecord) -> str:
    return sampler.solver if sampler.gamma is None else f"gamma {sampler.gamma:g}"


def setting_words(samplers: Sequence[SamplerRecord]) -> Callable[[SamplerRecord], Sequence[str]]:
    """Returns what names each of some samplers of one network, beside its NFE, by what varies among them.

    Its words are solver or gamma, guidance, guide, noise levels, churn and dtype; "" where one plays no part.
    """
    guided, by_others, churned, precise = (
        len({getattr(sampler, name) for sampler in samplers}) > 1 for name in ("guidance", "guide", "churn", "dtype")
    )
    schedules: dict[SamplerRecord, set[tuple[float, ...] | None]] = {}
    for sampler in samplers:
        schedules.setdefault(replace(sampler, sigmas=None), set()).add(sampler.sigmas)
    scheduled = any(len(levels) > 1 for levels in schedules.values())
    every = {sampler.sigmas for sampler in samplers if sampler.sigmas}
    distinct = [len({_levels(sigmas, digits) for sigmas in every}) for digits in range(MOST_DIGITS + 1)]
    digits = max(3, distinct.index(distinct[-1]))

    def words(sampler: SamplerRecord) -> Sequence[str]:
        return (
            _setting(sampler),
            f"guidance {sampler.guidance:g}" if guided else "",
            "".join(_guide(sampler)) if by_others else "",
            _levels(sampler.sigmas, digits) if scheduled and sampler.sigmas else "",
            _churn(sampler.churn) if churned and sampler.churn else "",
            sampler.dtype if precise else "",
        )

    return words


def sampler_words(sampler: SamplerRecord | None) -> str:
    """Returns how images were drawn, in words."""
    if sampler is None:
        return "-"
    words = [_setting(sampler)] if sampler.gamma is None or sampler.nfe > 1 else []  # gamma has no effect in one step
    words += [f"guidance {sampler.guidance:g}", *_guide(sampler)] if sampler.guidance != 1 else []
    words += [_levels(sampler.sigmas)] if sampler.sigmas else []
    words += [_churn(sampler.churn)] if sampler.churn else []
    words += [sampler.dtype] if sampler.dtype != "float32" else []
    return ", ".join(words)


def _guide(sampler: SamplerRecord) -> list[str]:
    return [] if sampler.guide is UNSET else [f"guide {sampler.guide:.8}"]


def _churn(values: Sequence[float]) -> str:
    return f"churn {' '.join(f'{value:g}' for value in values)}"


def _levels(sigmas: Sequence[float], digits: int = 3) -> str:
    return f"sigma {' '.join(f'{sigma:.{digits}g}' for sigma in sigmas)}"


TITLES = {"fd_dinov2": "FD-DINOv2", "fid": "FID", "kid": "KID", "is": "IS"}
"""What papers call metrics."""


def heading(metric: str) -> str:
    """Returns fid@5000 as FID@5000, and fd_digits@1000 as digits-FD@1000."""
    name = re.split(r"[\[@]", metric)[0]
    return TITLES.get(name, re.sub(r"^fd_(.+)", r"\1-FD", name).replace("_", " ")) + metric[len(name) :]


def number(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")
