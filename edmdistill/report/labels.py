"""Where the labels of curves stand: beside their ends if nothing is in the way there, and else beside the plot."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

LETTER, LINE = 6.4, 14
"""Width of a letter and height of a label, at most, in the units of the picture."""
APART = 9
"""Distance of a label from the end of its curve."""
BESIDE = 24
"""Distance of the labels beside the plot from it."""

Place = tuple[float, float]
"""x to the right and y downwards, in the units of the picture."""


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, start: Place, end: Place) -> bool:
        """Returns whether a straight line has a point in the box."""
        (x1, y1), (x2, y2) = sorted((start, end))
        if x2 < self.left or x1 > self.right:
            return False
        slope = (y2 - y1) / (x2 - x1) if x2 > x1 else 0.0
        low, high = y1 + slope * (max(x1, self.left) - x1), y2 + slope * (min(x2, self.right) - x2)
        return min(low, high) <= self.bottom and max(low, high) >= self.top

    def overlaps(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


class Label(NamedTuple):
    """The place of a label: the middle of its height, and of its width the start, middle or end.

    Attributes:
        beside: it stands beside the plot, where a line leads to it.
    """

    x: float
    y: float
    anchor: Literal["start", "middle", "end"] = "start"
    beside: bool = False

    def box(self, width: float) -> Box:
        left = self.x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        return Box(left, self.y - LINE / 2, left + width, self.y + LINE / 2)


def width(text: str) -> float:
    return LETTER * len(text)


def place_labels(
    lines: Sequence[Sequence[Place]], texts: Sequence[str], plot: Box, bars: Sequence[tuple[Place, Place]] = ()
) -> list[Label]:
    """Returns a label for each line, none over another or over a line.

    A label stands to the right of its line's last point, or anywhere around a single point, and where there is no room
    beside the plot: to its left, if its line is a single point on the left side, else to its right. Half of its height
    may be above or below the plot.

    Args:
        bars: other lines that no label may cover.
    """
    room = plot._replace(top=plot.top - LINE / 2, bottom=plot.bottom + LINE / 2)
    drawn = [*bars, *(pair for line in lines for pair in zip(line, [*line[1:], line[-1]], strict=True))]
    labels: dict[int, Label] = {}

    def put(index: int) -> bool:
        """Finds a place in the plot."""
        (x, y), wide = lines[index][-1], width(texts[index])
        options = [Label(x + APART, y)]
        if len(lines[index]) == 1:
            options += [Label(x - APART, y, "end"), Label(x, y - LINE, "middle"), Label(x, y + LINE, "middle")]
            options += [Label(x + APART, y + up) for up in (-LINE, LINE)]
        taken = [label.box(width(texts[other])) for other, label in labels.items()]
        for option in options:
            box = option.box(wide)
            around = box._replace(left=box.left - APART / 2, right=box.right + APART / 2)
            if room.holds(box) and not any(map(box.overlaps, taken)) and not any(around.meets(*pair) for pair in drawn):
                labels[index] = option
                return True
        return False

    order = sorted(range(len(lines)), key=lambda index: (lines[index][-1][1], index))
    on_left = [index for index in order if len(lines[index]) == 1 and lines[index][0][0] <= plot.left]
    if not all(list(map(put, on_left))):  # one column, not half of it in the plot
        for index in on_left:
            labels.pop(index, None)
        heights = spread_out([lines[index][-1][1] for index in on_left], plot.top, plot.bottom)
        for index, height in zip(on_left, heights, strict=True):
            labels[index] = Label(plot.left - BESIDE, height, "end", beside=True)
    on_right = [index for index in order if index not in labels and not put(index)]
    heights = spread_out([lines[index][-1][1] for index in on_right], plot.top, plot.bottom)
    for index, height in zip(on_right, heights, strict=True):
        labels[index] = Label(plot.right + BESIDE, height, beside=True)
    return [labels[index] for index in range(len(lines))]


def spread_out(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Returns heights that are LINE apart, and as near as possible to increasing ones by least squares.

    They are between top and bottom if there is room for all.
    """
    blocks: list[list[float]] = []  # of labels that touch: their heights less what stands above them
    for i, height in enumerate(heights):
        blocks.append([height - LINE * i])
        while len(blocks) > 1 and fmean(blocks[-1]) <= fmean(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    lowest = bottom - LINE * (len(heights) - 1)
    starts = [min(max(fmean(block), top), lowest) for block in blocks for _ in block]
    return [start + LINE * i for i, start in enumerate(starts)]
