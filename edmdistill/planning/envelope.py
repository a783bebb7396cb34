"""Memory as a function of the micro-batch: the highest of many lines, one for each moment of a pass."""

from __future__ import annotations

from collections.abc import Iterable

Line = tuple[int, int]
"""Bytes without images, and bytes for each image."""
Lines = tuple[Line, ...]
"""Moments of a pass, with the bytes that are live then. The highest line is the peak."""


def lines_through(low: list[int], high: list[int], images: int, more: int = 1) -> Lines:
    """Returns the lines from `low` bytes at so many images to `high` at `more`, moment by moment; see `envelope`."""
    slopes = (-((a - b) // more) for a, b in zip(low, high, strict=True))  # rounded up
    return envelope((a - images * slope, slope) for a, slope in zip(low, slopes, strict=True))


def envelope(lines: Iterable[Line]) -> Lines:
    """Returns those of the lines that are the highest for some number of images."""
    upper: list[Line] = []
    for fixed, each in sorted(set(lines), key=lambda line: (line[1], line[0])):
        while upper and _crosses_before(upper, (fixed, each)):
            upper.pop()
        upper.append((fixed, each))
    return tuple(upper)


def highest(lines: Lines, images: int) -> int:
    """Returns the bytes of the highest line at so many images."""
    return max(fixed + images * each for fixed, each in lines)


def _crosses_before(upper: list[Line], new: Line) -> bool:
    """Returns whether the last of the lines is nowhere above both the one before it and the new one.

    Args:
        new: steeper than the last, or as steep and higher.
    """
    if len(upper) == 1:
        return new[0] >= upper[0][0]
    (a, b), (c, d), (e, f) = upper[-2], upper[-1], new
    return (a - e) * (d - b) <= (a - c) * (f - b)
