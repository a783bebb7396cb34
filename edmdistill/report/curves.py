"""Axes, and small charts as SVG in the colors of the page around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from edmdistill.checkpoints.documents import escape

DENSEST = 0.6
"""Opacity of the largest cell of a map, on which its number can still be read."""
MARKED = 12
"""Points are marked on curves of at most this many."""
TICKS = 6
"""Largest number of ticks 1, 2, 5, 10 ... on a logarithmic axis; a longer axis has powers of ten."""

Point = tuple[float, float]


class Axis(NamedTuple):
    """A linear or logarithmic axis, from its first tick to its last."""

    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the position of a value, 0 to 1."""
        low, high = self.ticks[0], self.ticks[-1]
        return math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)


def axis(values: Sequence[float], log: bool = False, most: int = TICKS) -> Axis:
    """Returns an axis of round numbers around the values.

    It is logarithmic if all are positive and `log` is set or the largest is above 10 medians.

    Args:
        most: see TICKS.
    """
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    log = low > 0 and (log or 10 * middle < high)
    if log:
        if len(few := _ticks_one_two_five(low, high)) <= most:
            return Axis(few, log)
        low, high = math.log10(low), math.log10(high)
    if low == high:
        low, high = min(low, 0), max(high, 0)
    size = (high - low) / 4 or 1.0
    unit = 10.0 ** math.floor(math.log10(size))
    step = next(unit * factor for factor in (1, 2, 5, 10) if size <= unit * factor)
    step = math.ceil(step) if log else step
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * i for i in range(first, max(last, first + 1) + 1)]
    return Axis([10.0**tick for tick in ticks] if log else ticks, log)


def _ticks_one_two_five(low: float, high: float) -> list[float]:
    """Returns two or more of 1, 2, 5, 10 ... around positive numbers."""
    each = (digit * 10.0**power for power in count(math.floor(math.log10(low))) for digit in (1, 2, 5))
    ticks = [next(each)]
    while len(ticks) < 2 or ticks[-1] < high:
        tick = next(each)
        ticks = [tick] if tick <= low else [*ticks, tick]
    return ticks


def powers_of_two(lines: Iterable[Sequence[Point]]) -> Axis:
    """Returns an axis for numbers of evaluations: 1, 2, 4 ... up to the largest or beyond."""
    most = max((x for points in lines for x, _ in points), default=2)
    return Axis([2.0**i for i in range(math.ceil(math.log2(max(most, 2))) + 1)], log=True)


def downsample(points: Sequence[Point], most: int = 80) -> list[tuple[float, float, float, float]]:
    """Returns at most so many points: x, and the smallest, mean and largest y of neighbors, so that spikes stay."""
    size = -(-len(points) // most)
    groups = (list(zip(*points[i : i + size], strict=True)) for i in range(0, len(points), size))
    return [(xs[-1], min(ys), sum(ys) / len(ys), max(ys)) for xs, ys in groups]


class Frame(NamedTuple):
    """The rectangle of a chart between its axes, in the units of the picture."""

    x: Axis
    y: Axis
    left: float = 42
    right: float = 346
    top: float = 28
    bottom: float = 168

    def column(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x.at(value)

    def row(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y.at(value)

    def grid(self, start: float | None = None) -> str:
        """Returns the rules and the numbers of the axes as SVG.  start: where rules begin, if not on the left side."""
        rules = [
            f'<path d="M{self.left if start is None else start:g} {self.row(tick):.1f}H{self.right:g}"/>'
            f'<text y="{self.row(tick):.1f}" dy="4">{short(tick)}</text>'
            for tick in self.y.ticks
        ]
        numbers = [
            f'<text x="{self.column(tick):.1f}" y="{self.bottom + 18:g}" text-anchor="middle">{short(tick)}</text>'
            for tick in self.x.ticks
        ]
        return "".join([*rules, *numbers])


def svg_curves(title: str, series: Mapping[str, Sequence[Point]], x: Axis, *, log: bool = False) -> str:
    """Returns curves over one pair of axes, with their names above them, as SVG in the colors of the page.

    Args:
        series: points of finite numbers, by name; those of short curves are marked.
        log: see `axis`.
    """
    frame = Frame(x, axis([value for points in series.values() for _, value in points], log))
    names = "".join(f'<tspan class="c{i}" dx="9">{escape(name)}</tspan>' for i, name in enumerate(series))
    parts = [
        f'<text class="title" y="14">{escape(title)}</text>'
        f'<text x="{frame.right}" y="14" text-anchor="end">{names}</text>{frame.grid()}'
    ]
    for index, points in enumerate(series.values()):
        line = downsample(points)
        mean = [f"{frame.column(at):.1f},{frame.row(value):.1f}" for at, _, value, _ in line]
        band = [f"{frame.column(at):.1f},{frame.row(low):.1f}" for at, low, _, _ in line]
        band += [f"{frame.column(at):.1f},{frame.row(high):.1f}" for at, _, _, high in reversed(line)]
        marked = line if len(line) <= MARKED else []
        dots = [
            f'<circle cx="{frame.column(at):.1f}" cy="{frame.row(value):.1f}" r="3"/>' for at, _, value, _ in marked
        ]
        parts.append(
            f'<g class="c{index}"><polygon points="{" ".join(band)}"/><polyline points="{" ".join(mean)}"/>'
            f"{''.join(dots)}</g>"
        )
    return f'<svg viewBox="0 0 360 192" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def svg_heat_map(title: str, values: Mapping[tuple[float, float], float]) -> str:
    """Returns a map of positive numbers as SVG: columns by the first key, rows by the second, the largest at the top.

    The larger a number, the denser is its cell, in which it stands.
    """
    columns, rows = sorted({x for x, _ in values}), sorted({y for _, y in values}, reverse=True)
    left, right, top, bottom = 42, 346, 28, 168
    width, height = (right - left) / len(columns), (bottom - top) / len(rows)
    centers = {x: left + width * (i + 0.5) for i, x in enumerate(columns)}
    middles = {y: top + height * (i + 0.5) for i, y in enumerate(rows)}
    most = max(values.values()) or 1.0
    cells = "".join(
        f'<rect x="{centers[x] - width / 2:.1f}" y="{middles[y] - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" opacity="{DENSEST * value / most:.2f}"/>'
        for (x, y), value in values.items()
    )
    texts = [(centers[x], middles[y], f"{value:.2g}") for (x, y), value in values.items()]
    texts += [(center, bottom + 14, short(x)) for x, center in centers.items()]
    parts = [f'<text x="{x:.1f}" y="{y:.1f}" dy="4" text-anchor="middle">{text}</text>' for x, y, text in texts]
    parts += [f'<text y="{middle:.1f}" dy="4">{short(y)}</text>' for y, middle in middles.items()]
    heading = f'<text class="title" y="14">{escape(title)}</text><g class="c0">{cells}</g>'
    return f'<svg viewBox="0 0 360 192" role="img" aria-label="{escape(title)}">{heading}{"".join(parts)}</svg>'


def standalone_svg(svg: str, style: str) -> str:
    """Returns a chart as a file of its own, with a background and a margin, in the style of a page."""
    head, _, body = svg.partition(">")
    width, height = map(float, head.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    style += " svg, svg.chart { width: 100%; max-width: none; font-family: system-ui, sans-serif }"
    box = f"-12 -8 {width + 24:g} {height + 20:g}"
    paper = f'<rect x="-12" y="-8" width="{width + 24:g}" height="{height + 20:g}" fill="var(--paper)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="{box}"><style>{style}</style>{paper}{body}'


def short(value: float) -> str:
    """Returns a number for an axis: 0.5, 20k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
