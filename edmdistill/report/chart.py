"""Charts of several curves, told apart by labels: as SVG in the colors of a page, or by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edmdistill.checkpoints.documents import escape
from edmdistill.optional import importing
from edmdistill.report.curves import MARKED, Axis, Frame, Point, axis, downsample, short
from edmdistill.report.labels import BESIDE, LINE, Box, Label, Place, place_labels, width

COLORS = 6
"""The classes c0 ... of assets/report.html."""
MARKERS = {
    "o": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "s": "M-2.9 -2.9H2.9V2.9H-2.9z",
    "^": "M0 -3.9L3.7 2.7H-3.7z",
    "D": "M0 -4L4 0L0 4L-4 0z",
    "v": "M0 3.9L3.7 -2.7H-3.7z",
}
"""Shapes around a point, by matplotlib's names; as there is no sixth, 30 curves differ in color or shape."""
DASHES = "-", "--", ":", "-."
"""The classes d0 ... of assets/report.html, by matplotlib's names."""
TITLE = 1.2
"""How much larger the letters of a title are than those of a label."""
TICKS = 42.0
"""Width of the numbers of the y axis."""
WIDE = 3
"""A logarithmic axis is for values of which the largest is at least so many times the smallest."""
MOST_TICKS = 10


class Curve(NamedTuple):
    """A curve of a chart.

    Attributes:
        points: x and y, finite numbers; one or more.
        deviations: standard deviations of y by x, which are drawn as error bars.
        style: number of its color, marker and dash.
    """

    name: str
    points: Sequence[Point]
    deviations: Mapping[float, float] = {}
    style: int = 0

    @property
    def bars(self) -> list[tuple[float, float, float]]:
        """The x, lower and upper end of each error bar."""
        all_bars = ((at, value, self.deviations.get(at, 0.0)) for at, value in self.points)
        return [(at, value - size, value + size) for at, value, size in all_bars if size > 0]


class Chart(NamedTuple):
    """One or more curves over one pair of axes.

    Attributes:
        log: whether y may be on a logarithmic axis, which suits distances.
    """

    title: str
    curves: Sequence[Curve]
    x: Axis
    log: bool = True

    def y_axis(self) -> Axis:
        """Returns an axis around all points and error bars, of which a logarithmic one may cut the lower ends."""
        values = [value for curve in self.curves for _, value in curve.points]
        log = self.log and 0 < WIDE * min(values) <= max(values)
        ends = [end for curve in self.curves for _, *bar in curve.bars for end in bar]
        return axis([*values, *(end for end in ends if end > 0 or not log)], log, MOST_TICKS)

    def to_svg(self) -> str:
        """Returns the chart as SVG in the colors of the page, each curve with its label beside it."""
        tall = max(140, 1.5 * LINE * len(self.curves))  # so that labels beside it may stay near their curves
        wide = min(max(304, 1.25 * tall), 480)
        frame = Frame(self.x, self.y_axis(), TICKS, TICKS + wide, 28, 28 + tall)
        names = [curve.name for curve in self.curves]
        lines = [[_place(frame, at, mean) for at, _, mean, _ in downsample(curve.points)] for curve in self.curves]
        bars = [
            (_place(frame, at, low), _place(frame, at, high)) for curve in self.curves for at, low, high in curve.bars
        ]
        labels = place_labels(lines, names, Box(frame.left, frame.top, frame.right, frame.bottom), bars)
        on_left = [width(name) for name, label in zip(names, labels, strict=True) if label.x < frame.left]
        shift = BESIDE + max(on_left) if on_left else 0.0
        frame = frame._replace(left=frame.left + shift, right=frame.right + shift)
        labels = [label._replace(x=label.x + shift) for label in labels]
        curves = "".join(_error_bars(frame, curve) for curve in self.curves)  # below all lines
        curves += "".join(_drawn(frame, curve, label) for curve, label in zip(self.curves, labels, strict=True))
        ends = [label.box(width(name)).right for name, label in zip(names, labels, strict=True)]
        size = f"{max(frame.right + 14, TITLE * width(self.title), *ends):.0f} {frame.bottom + 24:.0f}"
        heading = f'<text class="title" y="14">{escape(self.title)}</text>{frame.grid(TICKS)}'
        box = f'class="chart" viewBox="0 0 {size}" width="{size.partition(" ")[0]}"'
        return f'<svg {box} role="img" aria-label="{escape(self.title)}">{heading}{curves}</svg>'


def _place(frame: Frame, at: float, value: float) -> Place:
    """Returns the place of a point; of what a logarithmic axis cannot show, on its lower side."""
    return frame.column(at), frame.row(max(value, frame.y.ticks[0]))


def _error_bars(frame: Frame, curve: Curve) -> str:
    """Returns a curve's error bars as SVG; "" if it has none."""
    parts = []
    for at, low, high in curve.bars:
        (x, top), (_, bottom) = _place(frame, at, high), _place(frame, at, low)
        parts.append(f'<path class="bar" d="M{x - 3:.1f} {top:.1f}h6m-3 0V{bottom:.1f}m-3 0h6"/>')
    return f'<g class="c{curve.style % COLORS}">{"".join(parts)}</g>' if parts else ""


def _drawn(frame: Frame, curve: Curve, label: Label) -> str:
    """Returns a curve with its markers and label as SVG."""
    places = [_place(frame, at, mean) for at, _, mean, _ in downsample(curve.points)]
    shape = list(MARKERS.values())[curve.style % len(MARKERS)]
    marked = places if len(places) <= MARKED else places[-1:]
    dash = f"d{curve.style // COLORS % len(DASHES)}"
    parts = [f'<polyline class="{dash}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    parts += [f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>' for x, y in marked]
    if label.beside:
        (x, y), sign = places[-1], -1 if label.anchor == "end" else 1
        parts.append(f'<path class="lead" d="M{x + 6 * sign:.1f} {y:.1f}L{label.x - 3 * sign:.1f} {label.y:.1f}"/>')
    anchor = f'x="{label.x:.1f}" y="{label.y:.1f}" dy="4" text-anchor="{label.anchor}"'
    parts.append(f'<text class="label" {anchor}>{escape(curve.name)}</text>')
    return f'<g class="c{curve.style % COLORS}">{"".join(parts)}</g>'


def save_matplotlib(chart: Chart, file: Path, kind: str, colors: Sequence[str]) -> None:
    """Draws a chart by matplotlib, on the same axes, with a legend in the order of the curves' last points.

    Args:
        kind: .png or .pdf.
        colors: as many as COLORS.
    Raises: EdmDistillError: matplotlib cannot be imported.
    """
    with importing("matplotlib", extra="plot", needed_by=f"a {kind} needs", instead=", or write an .svg or .html"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    figure = Figure(figsize=(8, max(4.0, 0.25 * len(chart.curves))), layout="constrained")
    axes = figure.subplots()
    shapes = list(MARKERS)
    for curve in sorted(chart.curves, key=lambda curve: -curve.points[-1][1]):
        columns, values = zip(*curve.points, strict=True)
        axes.errorbar(
            columns,
            values,
            yerr=[curve.deviations.get(at, 0.0) for at, _ in curve.points] if curve.deviations else None,
            label=curve.name.replace("$", r"\$"),  # which would begin a formula
            color=colors[curve.style % COLORS],
            linestyle=DASHES[curve.style // COLORS % len(DASHES)],
            marker=shapes[curve.style % len(shapes)] if len(curve.points) <= MARKED else None,
            markersize=5,
            capsize=2,
        )
    axes.set_title(chart.title.replace("$", r"\$"))
    for along, scale, locator in (
        (chart.x, axes.set_xscale, axes.xaxis),
        (chart.y_axis(), axes.set_yscale, axes.yaxis),
    ):
        scale("log" if along.log else "linear")
        locator.set_ticks(along.ticks, [short(tick) for tick in along.ticks], minor=False)
        locator.set_minor_locator(NullLocator())
    axes.set_ylim(chart.y_axis().ticks[0], chart.y_axis().ticks[-1])
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, format=kind[1:], dpi=150)
