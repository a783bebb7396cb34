"""Labels of curves: none over another or over a curve, near their ends, and in the picture."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.report.labels import LINE, Box, Label, place_labels, spread_out, width

PLOT = Box(40, 30, 440, 370)
heights = st.lists(st.floats(30, 370), min_size=1, max_size=20).map(sorted)
points = st.lists(st.tuples(st.floats(40, 440), st.floats(30, 370)), min_size=1, max_size=5, unique_by=lambda at: at[0])


@given(heights)
def test_labels_are_apart_in_order_and_between_the_edges(given: list[float]):
    placed = spread_out(given, 30, 370)
    assert all(lower - upper >= LINE - 1e-6 for upper, lower in pairwise(placed))
    assert placed[0] >= 30 - 1e-6
    assert placed[-1] <= 370 + 1e-6
    if all(lower - upper >= LINE for upper, lower in pairwise(given)):
        assert placed == pytest.approx(given), "there is no need to move"


def test_labels_move_as_little_as_they_can():
    assert spread_out([100, 100], 30, 370) == [100 - LINE / 2, 100 + LINE / 2]
    assert spread_out([100, 100, 100, 300], 30, 370) == [100 - LINE, 100, 100 + LINE, 300]
    assert spread_out([370, 370], 30, 370) == [370 - LINE, 370]
    assert spread_out([31, 31], 30, 370) == [30, 30 + LINE]
    assert spread_out([], 30, 370) == []


@given(st.tuples(st.floats(0, 99), st.floats(0, 99)), st.tuples(st.floats(0, 99), st.floats(0, 99)))
def test_a_box_meets_the_lines_that_have_a_point_in_it(start: tuple[float, float], end: tuple[float, float]):
    box = Box(30, 40, 60, 55)
    share = np.linspace(0, 1, 2001)[:, None]
    x, y = (np.array(start) * (1 - share) + np.array(end) * share).T

    def inside(margin: float) -> bool:
        across = (x >= box.left + margin) & (x <= box.right - margin)
        return bool((across & (y >= box.top + margin) & (y <= box.bottom - margin)).any())

    assert box.meets(start, end) == box.meets(end, start)
    assert inside(0) <= box.meets(start, end) <= inside(-0.1)


@given(st.lists(points.map(sorted), min_size=1, max_size=20))
def test_no_label_is_over_another_or_over_a_line(lines: list[list[tuple[float, float]]]):
    texts = [f"method {i}" for i in range(len(lines))]
    labels = place_labels(lines, texts, PLOT)
    boxes = [label.box(width(text)) for label, text in zip(labels, texts, strict=True)]
    assert not any(a._replace(bottom=a.bottom - 1e-6).overlaps(b) for a, b in combinations(boxes, 2))
    for label, box in zip(labels, boxes, strict=True):
        assert label.beside == (not PLOT._replace(top=30 - LINE / 2, bottom=370 + LINE / 2).holds(box))
        assert label.beside or not any(box.meets(*pair) for line in lines for pair in pairwise([*line, line[-1]]))


def test_a_label_is_where_there_is_room():
    falling = [(40.0, 100.0), (200.0, 300.0)]
    (alone,) = place_labels([falling], ["a"], PLOT)
    assert (alone.anchor, alone.beside, alone.y) == ("start", False, 300.0)
    assert 0 < alone.x - 200 < 20
    (at_the_edge,) = place_labels([[(40.0, 100.0), (440.0, 300.0)]], ["a"], PLOT)
    assert at_the_edge.beside
    assert at_the_edge.x > PLOT.right
    crossing = [(205.0, 100.0), (206.0, 370.0)]
    moved, _ = place_labels([falling, crossing], ["a", "b"], PLOT)
    assert moved.beside, "the other line is in the way"
    single, _ = place_labels([[(200.0, 300.0)], crossing], ["a", "b"], PLOT)
    assert single.anchor == "end", "left of its point"
    barred = place_labels([[(200.0, 300.0)]], ["a"], PLOT, [((205.0, 250.0), (205.0, 350.0))])
    assert barred[0].anchor == "end"


def test_single_points_on_the_left_side_are_all_named_there_or_none():
    near, far = [[(40.0, y)] for y in (100.0, 103.0, 106.0)], [(40.0, 300.0)]
    labels = place_labels([*near, far], ["a", "b", "c", "d"], PLOT)
    assert {(label.anchor, label.beside) for label in labels} == {("end", True)}
    assert all(label.x < PLOT.left for label in labels)
    assert place_labels([near[0], far], ["a", "d"], PLOT) == [Label(49.0, 100.0), Label(49.0, 300.0)]
