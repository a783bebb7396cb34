"""Curves that hold what they are drawn from."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.curves import Axis, axis, coarse, svg_curves

numbers = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(numbers, min_size=1, max_size=50))
def test_an_axis_holds_its_values_between_a_few_round_ticks(values: list[float]):
    scale = axis(values)
    assert 2 <= len(scale.ticks) <= 6
    assert scale.ticks == sorted(set(scale.ticks))
    for value in values:
        assert -1e-6 <= scale.at(value) <= 1 + 1e-6


def test_axes_are_straight_or_logarithmic():
    assert axis([0, 1.0, 100.0]) == Axis([0, 50, 100])
    assert axis([0.5, 3, 551.0]) == Axis([0.1, 1, 10, 100, 1000], log=True)
    assert axis([7.0, 7.0]).ticks[0] == 0
    assert axis([0.0]) == Axis([0, 1])
    assert axis([2.0, 30.0], log=True) == Axis([1, 10, 100], log=True)
    assert not axis([-2.0, 30.0], log=True).log
    assert Axis([1.0, 64.0], log=True).at(8) == pytest.approx(0.5)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=500))
def test_few_points_stand_for_many_and_spikes_stay(points: list[tuple[float, float]]):
    line = coarse(points)
    assert len(line) <= 80
    assert line[-1][0] == points[-1][0]
    assert min(low for _, low, _, _ in line) == min(y for _, y in points)
    assert max(high for *_, high in line) == max(y for _, y in points)
    if len(points) <= 80:
        assert [(x, y) for x, _, y, _ in line] == points


def test_curves_stay_in_their_frame():
    svg = svg_curves("a < b", {"one": [(0, 1.0), (5, 2.0)], "two": [(10, -1.0)]}, Axis([0, 10]))
    ElementTree.fromstring(svg)  # whole, and escaped
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="(.*?)" cy="(.*?)"', svg)]
    assert len(dots) == 3
    assert all(42 <= x <= 346 and 28 <= y <= 168 for x, y in dots)
    assert "a &lt; b" in svg
    assert [name for name in ("one", "two") if f">{name}</tspan>" in svg] == ["one", "two"]
