"""The highest of many lines."""

from fractions import Fraction
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from edmdistill.planning.envelope import envelope, highest, peak, uneven_lines


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=30), st.integers(0, 100))
def test_the_envelope_is_the_highest_line_everywhere(lines: list[tuple[int, int]], images: int) -> None:
    upper = envelope(lines)
    assert highest(upper, images) == max(fixed + images * each for fixed, each in lines)
    assert set(upper) <= set(lines)
    # Each line that stays is above all others somewhere between two crossings, or beyond the last.
    crossings = {Fraction(a - c, d - b) for (a, b), (c, d) in combinations(lines, 2) if b != d}
    places = sorted({Fraction(0), *(x for x in crossings if x > 0)})
    between = [(x + y) / 2 for x, y in zip(places, [*places[1:], places[-1] + 2], strict=True)]
    best = [max(fixed + x * each for fixed, each in lines) for x in between]
    for line in upper:
        others = [highest(tuple(other for other in upper if other != line), x) for x in between] if upper[1:] else [-1]
        assert any(other < most for other, most in zip(others, best, strict=False))


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 7),
)
def test_the_lines_of_two_measurements_are_not_below_them(
    moments: list[tuple[int, int]], images: int, more: int
) -> None:
    """They meet the first, and are less than a byte an image above the second, by which a slope is rounded."""
    low, high = ([moment[i] for moment in moments] for i in (0, 1))
    (lines,) = uneven_lines(low, low, high, images, more, 1)
    assert highest(lines, images) == max(low)
    assert max(high) <= highest(lines, images + more) < max(high) + more


@given(
    st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_the_largest_of_several_pieces_counts(
    moments: list[tuple[int, int, int]], pieces: int, first: int, images: int
) -> None:
    """Each moment holds bytes of its own, for each image, and for each image of the largest piece."""

    def bytes_of(images: int) -> list[int]:
        return [fixed + each * images + of_piece * -(-images // pieces) for fixed, each, of_piece in moments]

    rows = first * pieces
    lines = uneven_lines(*map(bytes_of, (rows, rows + pieces - 1, rows + pieces)), rows, pieces, pieces)
    more = peak(lines, images) - max(bytes_of(images))
    assert abs(more) <= abs(images - rows) + 1  # a slope is rounded up by less than a byte
    assert more >= 0 or images < rows
