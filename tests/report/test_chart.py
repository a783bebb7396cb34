"""Charts of several curves: each point, error bar and label in its place, and curves that anybody can tell apart."""

import math
import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.report.chart import COLORS, DASHES, MARKERS, Chart, Curve, save_matplotlib
from edmdistill.report.curves import Axis, powers_of_two
from edmdistill.report.page import PAGE

X = Axis([1.0, 2.0, 4.0, 8.0], log=True)
values = st.floats(1e-3, 1e6)


def method(measured: dict[int, tuple[float, float]]) -> Curve:
    steps = sorted(measured)
    return Curve("a method", [(n, measured[n][0]) for n in steps], {n: measured[n][1] for n in steps})


curves = st.lists(
    st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.tuples(values, values), min_size=1).map(method),
    min_size=1,
    max_size=20,
)


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.to_svg())


def marks(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each curve that has some."""
    each = [re.findall(r"translate\((\S+) (\S+)\)", ElementTree.tostring(group, "unicode")) for group in svg.iter("g")]
    return [[(float(x), float(y)) for x, y in some] for some in each if some]


def ticks(svg: ElementTree.Element) -> tuple[dict[str, float], dict[str, float]]:
    """Where the numbers of the axes are: x and y."""
    texts = [text for text in svg.findall("text") if text.get("class") is None]
    across = {text.text or "": float(text.get("x", 0)) for text in texts if text.get("x")}
    return across, {text.text or "": float(text.get("y", 0)) for text in texts if not text.get("x")}


def test_points_and_error_bars_are_where_the_axes_say():
    many = Curve("many", [(1, 50.0), (2, 20.0), (8, 5.0)], {1: 30.0, 8: 1.0})
    svg = drawn(Chart("FD", [many, Curve("one", [(4, 10.0)], style=1)], X))
    across, up = ticks(svg)
    (first, second, last), (single,) = marks(svg)
    assert first == pytest.approx((across["1"], up["50"]), abs=0.1)
    assert second == pytest.approx((across["2"], up["20"]), abs=0.1)
    assert last == pytest.approx((across["8"], up["5"]), abs=0.1)
    assert single == pytest.approx((across["4"], up["10"]), abs=0.1)
    bars = [path.get("d") for path in svg.iter("path") if path.get("class") == "bar"]
    ends = [tuple(map(float, re.findall(r"^M\S+ (\S+?)h.*V(\S+?)m", bar)[0])) for bar in bars]
    assert len(ends) == 2
    a_decade = up["10"] - up["100"]
    assert ends[0] == pytest.approx([up["100"] - a_decade * math.log10(y / 100) for y in (80, 20)], abs=0.1)
    assert ends[1] == pytest.approx([up["100"] - a_decade * math.log10(y / 100) for y in (6, 4)], abs=0.1)


def test_a_bar_below_a_logarithmic_axis_ends_at_it():
    svg = drawn(Chart("FD", [Curve("a", [(1, 50.0), (2, 5.0)], {2: 9.0})], X))
    (bar,) = (path.get("d") for path in svg.iter("path") if path.get("class") == "bar")
    assert float(re.findall(r"V(\S+?)m", bar)[0]) == max(ticks(svg)[1].values())


@pytest.mark.parametrize(
    ("log", "ys", "curved"), [(True, (2, 20), True), (True, (2, 3), False), (False, (2, 20), False)]
)
def test_an_axis_is_logarithmic_for_distances_that_differ_much(log: bool, ys: tuple[float, float], curved: bool):
    assert Chart("", [Curve("a", list(zip((1.0, 2.0), ys, strict=True)))], X, log=log).y_axis().log == curved


@given(curves)
def test_everything_is_in_the_picture(curves: list[Curve]):
    svg = drawn(Chart("title", curves, X))
    _, _, wide, tall = map(float, svg.get("viewBox", "").split())
    assert len(marks(svg)) == len(curves)
    for (x, y), curve_ in ((place, curve) for curve, some in zip(curves, marks(svg), strict=True) for place in some):
        assert 0 <= x <= wide, curve_
        assert 0 <= y <= tall
    for text in (text for text in svg.iter("text") if text.get("class") == "label"):
        size, x = 6.4 * len(text.text or ""), float(text.get("x", 0))
        start = x - size * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "")]
        assert -1 <= start <= start + size <= wide + 1
        assert 0 <= float(text.get("y", 0)) <= tall


def test_a_long_title_is_in_the_picture():
    words = "digits-FD in 2 NFE, against a/file/of/statistics.npz, 5000 images, by device hours"
    _, _, wide, _ = map(float, drawn(Chart(words, [Curve("a", [(1, 1.0)])], X)).get("viewBox", "").split())
    assert wide >= 1.2 * 6.4 * len(words)


def test_thirty_curves_look_different():
    svg = drawn(Chart("", [Curve(str(i), [(1, 1.0 + i), (2, 2.0 + i)], style=i) for i in range(30)], X))
    looks = {
        (group.get("class"), next(path.get("d") for path in group.iter("path") if path.get("class") == "mark"))
        for group in svg.iter("g")
    }
    dashes = {line.get("class") for line in svg.iter("polyline")}
    assert len(looks) == 30
    assert dashes == {f"d{i}" for i in range(len(DASHES))}
    style = PAGE.read_text("utf-8")
    assert all(f".{name} {{" in style for name in [*(f"c{i}" for i in range(COLORS)), *(dashes - {"d0"})])


def test_long_curves_are_marked_at_their_ends_alone():
    points = [(float(i), float(i)) for i in range(1, 200)]
    ((last,),) = marks(drawn(Chart("", [Curve("a", points)], powers_of_two([points]))))
    assert last == pytest.approx(
        marks(drawn(Chart("", [Curve("a", points[-1:])], powers_of_two([points]))))[0][0], abs=1
    )


def palettes() -> list[tuple[str, list[str]]]:
    """The paper and the colors of curves, by light and by dark."""
    each = re.findall(r":root \{(.*?)\}", PAGE.read_text("utf-8"), re.DOTALL)
    named = [dict(re.findall(r"--(\w+): (#\w{6})", text)) for text in each]
    return [(name["paper"], list(name.values())[-COLORS:]) for name in named]


LINEAR = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
SIGHT = {  # Machado, Oliveira & Fernandes 2009: how linear RGB looks
    "usual": np.eye(3),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}


def linear(color: str) -> np.ndarray:
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB, in which distances of 2.3 are just noticeable."""
    x, y, z = np.cbrt(LINEAR @ rgb.clip(0, 1) / [0.9505, 1, 1.0888])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_everybody_can_tell_the_colors_apart(sight: str):
    for _, colors in palettes():
        for a, b in combinations(colors, 2):
            assert np.linalg.norm(lab(SIGHT[sight] @ linear(a)) - lab(SIGHT[sight] @ linear(b))) > 15, (a, b)


def test_the_colors_can_be_read_on_their_paper():
    """As WCAG asks for text."""
    assert len(palettes()) == 3, "light, dark and print"
    for paper, colors in palettes():
        for color in colors:
            darker, lighter = sorted(LINEAR[1] @ linear(each) + 0.05 for each in (paper, color))
            assert lighter / darker >= 4.5, color


def test_matplotlib_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    low, high = Curve("$low$", [(1, 9.0), (8, 1.0)], {1: 2.0}), Curve("high", [(2, 30.0)], style=7)
    chart = Chart("FD of $x", [low, high], X)
    save_matplotlib(chart, tmp_path / "a.png", ".png", [f"#{i}{i}{i}" for i in range(COLORS)])
    axes = figures[0].axes[0]
    assert [line.get_data()[1].tolist() for line, _, _ in axes.containers] == [[30.0], [9.0, 1.0]], "the highest first"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["high", r"\$low\$"]
    (bars,) = axes.containers[1][2]
    assert bars.get_segments()[0][:, 1].tolist() == [7.0, 11.0]
    assert axes.containers[0][0].get_color() == "#111"
    assert axes.containers[0][0].get_marker() == list(MARKERS)[7 % len(MARKERS)]
    assert axes.get_ylim() == (chart.y_axis().ticks[0], chart.y_axis().ticks[-1])
    assert axes.get_yscale() == axes.get_xscale() == "log"
