"""The highest of many lines."""

from hypothesis import given
from hypothesis import strategies as st

from edmdistill.planning.envelope import envelope, highest


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=30), st.integers(0, 100))
def test_the_envelope_is_the_highest_line_everywhere(lines: list[tuple[int, int]], images: int) -> None:
    upper = envelope(lines)
    assert highest(upper, images) == max(fixed + images * each for fixed, each in lines)
    assert len(upper) <= len(set(lines))
