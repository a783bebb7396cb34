"""Results side by side as curves: what is one, where its points are, and what it is called."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.compare import Comparison, Row, compare
from edmdistill.evaluation.protocol import PROTOCOLS, Likelihood
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.training_seeds import Group, SeedTable
from edmdistill.report.chart import Chart
from edmdistill.report.comparison import charts_by_nfe, distinct_names, lines_of, short_names, undrawn
from edmdistill.sampling.spec import SamplerRecord

VALUES = {"fd_digits": 2.5, "class_accuracy": 0.9}


def result(nfe: int, values: dict[str, float] = VALUES, images: int | None = None, **sampler: Any) -> Result:
    return Result(
        metrics=values,
        protocol=PROTOCOLS["digits"],
        protocol_sha256="same",
        sampler=SamplerRecord(**{"solver": "gamma", "gamma": 1.0} | sampler, nfe=nfe),
        provenance={} if images is None else {"images_seen": images},
    )


def charts(table: Comparison | SeedTable) -> list[Chart]:
    return charts_by_nfe(table, lines_of(table))


def names(*rows: Row) -> list[str]:
    return [line.name for line in lines_of(compare(rows))]


def test_a_curve_is_a_source_with_its_points_in_order():
    rows = [Row("runs/a", result(nfe, {"fd_digits": 8.0 / nfe})) for nfe in (4, 1, 2)]
    rows += [Row("runs/b", result(2, {"fd_digits": 3.0, "class_accuracy": 0.5}))]
    distances, accuracy = charts(compare(rows))
    assert [(curve.name, curve.points) for curve in distances.curves] == [
        ("a", [(1.0, 8.0), (2.0, 4.0), (4.0, 2.0)]),
        ("b", [(2.0, 3.0)]),
    ]
    assert (distances.title, accuracy.title) == ("digits-FD by NFE", "class accuracy by NFE")
    assert (distances.log, accuracy.log) == (True, False)
    assert [(curve.name, curve.points) for curve in accuracy.curves] == [("b", [(2.0, 0.5)])]
    assert accuracy.curves[0].style == distances.curves[1].style != distances.curves[0].style
    assert distances.x.ticks == [1.0, 2.0, 4.0]


def test_what_differs_is_the_name():
    assert names(Row("runs/a", result(1)), Row("runs/b", result(1, gamma=0.0))) == ["a", "b"]
    assert names(Row("runs/a", result(2)), Row("runs/a", result(2, gamma=0.0))) == ["gamma 1", "gamma 0"]
    heun = {"solver": "heun", "gamma": None}
    guided = [Row("t.pkl", result(3, guidance=weight, **heun)) for weight in (1.0, 1.5)]
    assert names(*guided) == ["guidance 1", "guidance 1.5"]
    assert names(*guided, Row("a", result(2))) == ["t.pkl, guidance 1", "t.pkl, guidance 1.5", "a"]
    assert names(Row("runs/a", result(1)), Row("runs/a", result(2))) == ["a"]
    teacher = Row("runs/a", result(7, **heun), Path("runs/a"), of_teacher=True)
    assert names(Row("runs/a", result(2, images=640)), teacher) == ["a", "teacher"]
    assert names(*(Row("a", result(2, images=images)) for images in (1, 2000))) == ["1 image seen", "2,000 images seen"]
    raw = result(2, images=9)
    raw = replace(raw, provenance=raw.provenance | {"weights": "raw"})
    assert names(Row("a", result(2, images=9)), Row("a", raw))[1] == "raw weights, 9 images seen"


def test_noise_levels_are_a_name_only_where_nothing_else_is():
    """They differ by NFE anyhow."""
    rows = [Row("a", result(n, sigmas=levels)) for n, levels in ((1, (80.0,)), (2, (80.0, 2.0)), (2, (80.0, 1.0)))]
    assert names(*rows[:2]) == ["a"]
    assert names(*rows) == ["a", "sigma 80 2", "sigma 80 1"]


def test_a_result_that_is_there_twice_is_drawn_twice():
    row = Row("a", result(2))
    assert names(row, row, Row("a", result(4))) == ["a", "#2"]
    few = Row("a", result(2, {"fd_digits@9": 7.0}))
    assert names(row, few) == ["a"], "another metric has a chart of its own"
    assert [chart.curves[0].points for chart in charts(compare([row, few]))] == [
        [(2.0, 2.5)],
        [(2.0, 0.9)],
        [(2.0, 7.0)],
    ]


def test_seeds_are_a_mean_with_an_error_bar():
    def group(nfe: int, *values: float) -> Group:
        rows = [
            Row(f"runs/a-{i}", result(nfe, {"fd_digits": value}), Path(f"runs/a-{i}")) for i, value in enumerate(values)
        ]
        return Group(rows, range(len(values)))

    table = SeedTable([group(1, 1.0, 2.0, 3.0), group(2, 4.0)], ["fd_digits"], [])
    (line, alone) = charts(table)[0].curves
    assert (line.name, line.points, line.deviations) == ("a-{0,1,2}", [(1.0, 2.0)], {1.0: 1.0})
    assert (alone.name, alone.points, alone.deviations) == ("a-0", [(2.0, 4.0)], {})
    assert lines_of(table)[0].folders == [Path(f"runs/a-{i}") for i in range(3)]


def test_what_has_no_number_of_evaluations_is_named():
    images = Row("them", replace(result(1), sampler=None))
    solver = result(9, {"nll": 3.0}, solver="rk45", gamma=None)
    fine = Likelihood(probes=1, tolerance=1e-5, sigma_min=0.002, sigma_max=80.0)
    likelihood = Row("nats", replace(solver, protocol=replace(solver.protocol, features=None, likelihood=fine)))
    table = compare([Row("a", result(2)), images, images, likelihood])
    assert [line.name for line in lines_of(table)] == ["a"]
    assert undrawn(table) == "Not drawn, as the number of evaluations is not known: them, nats."
    assert undrawn(compare([Row("a", result(2))])) == ""
    with pytest.raises(EdmDistillError, match="none of these results is of images drawn in a known number"):
        charts(compare([images]))


columns = st.tuples(*(st.sampled_from(words) for words in (["a", "b"], ["", "c", "d"], ["", "e", "f"])))


@given(st.lists(columns, min_size=1, max_size=12, unique=True))
def test_names_differ_and_say_nothing_that_all_share(facts: list[tuple[str, ...]]):
    found = distinct_names(facts)
    assert len(set(found)) == len(facts)
    shared = {column[0] for column in zip(*facts, strict=True) if len(set(column)) == 1}
    for own, name in zip(facts, found, strict=True):
        words = name.split(", ")
        assert words == [word for word in own if word in words]
        assert words == [own[0]] or not shared & set(words)


def test_names_of_paths_are_as_short_as_they_can_be():
    def short(*paths: str) -> list[str]:
        return list(short_names(paths).values())

    assert short("runs/a", "runs/b") == ["a", "b"]
    assert short("runs/a/generator", "runs/b/generator") == ["a", "b"]
    assert short("x/a", "y/a", "y/b") == ["x/a", "y/a", "b"]
    assert short("a", "x/a") == ["a", "x/a"]
    assert short("/data/runs/a/") == ["a"]
    assert short("https://host/edm.pkl", "runs/a") == ["edm.pkl", "a"]
    assert short("runs/{a/0,b/1}", "runs/c") == ["{a/0,b/1}", "c"]
    assert short("/") == ["/"]


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), min_size=1, max_size=9))
def test_no_two_paths_have_one_name(paths: set[str]):
    short = short_names(sorted(paths))
    assert len(set(short.values())) == len(paths)
    assert all(f"/{name}" in f"/{path}" for path, name in short.items())
