"""Curves: axes around their values, few points for many, and everything inside the frame."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.report.curves import (
    TICKS,
    Axis,
    axis,
    downsample,
    powers_of_two,
    standalone_svg,
    svg_curves,
    svg_heat_map,
)

numbers = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(numbers, min_size=1, max_size=50))
def test_an_axis_holds_its_values_between_a_few_round_ticks(values: list[float]):
    scale = axis(values)
    assert 2 <= len(scale.ticks) <= 6
    assert scale.ticks == sorted(set(scale.ticks))
    for value in values:
        assert -1e-6 <= scale.at(value) <= 1 + 1e-6


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50))
def test_a_logarithmic_axis_is_no_longer_than_its_values_need(values: list[float]):
    ticks = axis(values, log=True).ticks
    assert 2 <= len(ticks) <= TICKS
    if max(values) <= 10 * min(values):  # 1, 2, 5, 10 ...: no step is longer than 2.5 times
        assert all(above <= 2.5 * below * (1 + 1e-9) for below, above in pairwise(ticks))
        assert ticks[1] > min(values)
        assert len(ticks) == 2 or ticks[-2] < max(values)


def test_axes_are_straight_or_logarithmic():
    assert axis([0, 1.0, 100.0]) == Axis([0, 50, 100])
    assert axis([0.5, 3, 551.0]) == Axis([0.1, 1, 10, 100, 1000], log=True)
    assert axis([7.0, 7.0]).ticks[0] == 0
    assert axis([0.0]) == Axis([0, 1])
    assert axis([2.0, 30.0], log=True) == Axis([2, 5, 10, 20, 50], log=True)
    assert axis([0.2, 30.0], log=True) == Axis([0.1, 1, 10, 100], log=True)
    assert axis([1.1, 90.0], log=True) == Axis([1, 10, 100], log=True)
    assert not axis([-2.0, 30.0], log=True).log
    assert Axis([1.0, 64.0], log=True).at(8) == pytest.approx(0.5)


@given(st.lists(st.tuples(numbers, numbers), min_size=1), st.integers(1, 20))
def test_few_points_stand_for_many_and_spikes_stay(points: list[tuple[float, float]], most: int):
    line = downsample(points, most)
    assert len(line) <= most
    assert line[-1][0] == points[-1][0]
    assert min(low for _, low, _, _ in line) == min(y for _, y in points)
    assert max(high for *_, high in line) == max(y for _, y in points)
    if len(points) <= most:
        assert [(x, y) for x, _, y, _ in line] == points


def test_a_map_has_the_numbers_of_a_matrix_in_their_places():
    svg = ElementTree.fromstring(svg_heat_map("gap", {(0.1, 80.0): 4.0, (0.1, 0.3): 1.0, (1.0, 80.0): 2.0}))
    cells = [{name: float(value) for name, value in cell.items()} for cell in svg.iter("rect")]
    assert [cell["opacity"] for cell in cells] == pytest.approx([0.6, 0.15, 0.3]), "in proportion"
    assert [(cell["x"], cell["y"]) for cell in cells] == [(42, 28), (42, 98), (194, 28)], (
        "s across, the largest t on top"
    )
    assert all((cell["width"], cell["height"]) == (152, 70) for cell in cells)
    texts = {text.text: (float(text.get("x", 0)), float(text.get("y"))) for text in svg.iter("text")}
    assert (texts["4"], texts["2"]) == ((118, 63), (270, 63))
    assert texts["80"][1] == texts["4"][1]
    assert texts["0.1"][0] == texts["4"][0]


def test_a_map_of_zeros_is_empty():
    assert 'opacity="0.00"' in svg_heat_map("none", {(1.0, 2.0): 0.0})


SERIES = {"a < b": [(1, 1.0), (5, 2.0)], "two": [(8, -1.0)]}


def coordinates(svg: str) -> list[tuple[float, float]]:
    """Of every dot and every corner of a line."""
    dots = re.findall('cx="(.*?)" cy="(.*?)"', svg)
    corners = [pair.split(",") for points in re.findall('points="(.*?)"', svg) for pair in points.split()]
    return [(float(x), float(y)) for x, y in [*dots, *corners]]


@given(st.dictionaries(st.text(), st.lists(st.tuples(st.floats(1, 64), numbers), min_size=1), min_size=1))
def test_curves_stay_in_their_frame(series: dict[str, list[tuple[float, float]]]):
    svg = svg_curves("any", series, powers_of_two(series.values()))
    assert all(42 <= x <= 346 and 28 <= y <= 168 for x, y in coordinates(svg))


def test_a_chart_names_its_curves_and_marks_their_few_points():
    chart = ElementTree.fromstring(svg_curves("c < d", SERIES, powers_of_two(SERIES.values())))
    assert [name.text for name in chart.iter("tspan")] == ["a < b", "two"]
    assert [len(curve.findall("circle")) for curve in chart.iter("g")] == [2, 1]
    long = {"": [(float(x), 1.0) for x in range(1, 65)]}
    assert "circle" not in svg_curves("long", long, powers_of_two(long.values()))
    one = svg_curves("one round", {"": [(64, 1.0)]}, powers_of_two(long.values()))
    assert "circle" in one, "a line of one point is none"


def test_a_chart_goes_up_and_to_the_right_between_its_smallest_and_largest_values():
    points = [(float(x), float(x // 2 * 1000 - 2000)) for x in range(1, 161)]
    svg = svg_curves("c", {"": points}, powers_of_two([points]))
    (mean,) = re.findall('polyline points="(.*?)"', svg)
    columns, rows = zip(*(map(float, pair.split(",")) for pair in mean.split()), strict=True)
    assert columns == tuple(sorted(columns))
    assert rows == tuple(sorted(rows, reverse=True))
    assert len(rows) == 80
    (band,) = re.findall('polygon points="(.*?)"', svg)
    corners = [tuple(map(float, pair.split(","))) for pair in band.split()]
    for (x, low), (same, high), middle in zip(corners[:80], reversed(corners[80:]), rows, strict=True):
        assert x == same
        assert low > middle > high or low == middle == high
    assert ">-20k</text>" in svg_curves("c", {"": [(1, -2e4), (2, 1.0)]}, powers_of_two([]))
    assert downsample([(1, 0.0), (2, 1.0), (3, 5.0)], 1) == [(3, 0.0, 2.0, 5.0)]


def test_a_logarithmic_chart_has_logarithmic_ticks():
    series = {"": [(1, 2.0), (2, 30.0)]}
    ticks = [
        re.findall(">([^<]+)</text>", svg_curves("c", series, powers_of_two(series.values()), log=log))
        for log in (0, 1)
    ]
    assert "5" in ticks[1]
    assert "5" not in ticks[0]


def test_numbers_of_evaluations_lie_on_powers_of_two():
    assert powers_of_two(SERIES.values()).ticks == [1, 2, 4, 8]
    assert powers_of_two([[(9, 0.0)]]).ticks[-1] == 16
    assert powers_of_two([[(1, 0.0)]]).ticks == [1, 2]
    assert powers_of_two([]).ticks == [1, 2]


def test_a_chart_alone_is_a_file_of_its_own():
    style = ":root { --paper: #fff } div > svg { color: red }"
    page = ElementTree.fromstring(standalone_svg(svg_curves("c", SERIES, powers_of_two(SERIES.values())), style))
    space = "{http://www.w3.org/2000/svg}"
    assert page.tag == f"{space}svg"
    assert style in page.find(f"{space}style").text
    x, y, width, height = map(float, page.get("viewBox").split())
    paper = page.find(f"{space}rect")
    assert [float(paper.get(name)) for name in ("x", "y", "width", "height")] == [x, y, width, height]
