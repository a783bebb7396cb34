"""Memory as a function of the micro-batch: the highest of many lines, one for each moment of a pass."""

from __future__ import annotations

from collections.abc import Iterable

Line = tuple[int, int]
"""Bytes without images, and bytes for each image."""
Lines = tuple[Line, ...]
"""Moments of a pass, with the bytes that are live then. The highest line is the peak."""
Uneven = tuple[Lines, ...]
"""Those of a pass whose loss goes through p pieces, by the images that its micro-batch lacks to a multiple of p."""


def uneven_lines(low: list[int], middle: list[int], high: list[int], images: int, more: int, pieces: int) -> Uneven:
    """Returns the lines of a pass whose loss goes through several pieces.

    Of r images the largest piece has ceil(r / p): as many as of the next multiple of p. What each moment holds for an
    image of the micro-batch is told from what it holds for one of the piece by a pass of fewer images whose largest
    piece is as large.

    Args:
        low, high: bytes of each moment at `images` and at `images + more`, multiples of `pieces`.
        middle: at `images + more - more / pieces`.
    """
    slopes = [-((a - b) // more) for a, b in zip(low, high, strict=True)]  # rounded up
    fixed = [a - images * slope for a, slope in zip(low, slopes, strict=True)]
    # Of an image more in the largest piece; 0 in the first piece, which is the smaller one in the middle.
    of_piece = [max(0, c - a - pieces * max(0, c - b)) for a, b, c in zip(low, middle, high, strict=True)]
    return tuple(
        envelope(
            (f - (-lacking * piece // more), slope) for f, slope, piece in zip(fixed, slopes, of_piece, strict=True)
        )
        for lacking in range(pieces)
    )


def peak(lines: Uneven, images: int) -> int:
    """Returns the bytes of the highest line at so many images."""
    return highest(lines[-images % len(lines)], images)


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
