"""The table of methods: what each contestant trains by on either set, and what is printed and drawn of its runs."""

from pathlib import Path

import pytest
from digits_methods import CONTESTANTS, NFE, Race, cell, chart, recipe_of, row

from edmdistill.defaults import defaults


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_shorter_run_keeps_the_shares_of_its_recipe(name: str) -> None:
    """Warm-ups shrink with the run; on tiles two steps are on EDM's curve."""
    for data in ("digits", "tiles"):
        race = Race(data, Path())
        whole, short = recipe_of(race, name)[0], recipe_of(race, name, images=3200, seed=7)[0]
        assert (short.training.images, short.training.seed) == (3200, 7)
        usual = defaults(whole.method)
        for key in (key for key in usual if key.endswith("_images") and getattr(whole.method, key) != usual[key]):
            share = getattr(whole.method, key) / whole.training.images
            assert getattr(short.method, key) == pytest.approx(share * 3200, abs=1)
        if data == "tiles":
            assert whole.sampling.sigmas.get("2") in (None, (80.0, 2.515))


def test_runs_on_either_set_are_told_apart() -> None:
    digits, tiles = (recipe_of(Race(data, Path()), "vsd")[1] for data in ("digits", "tiles"))
    assert digits != tiles


def test_stages_follow_one_another() -> None:
    race = Race("digits", Path())
    assert race.stages("scd") == ["scd"]
    assert race.stages("tcm") == ["ect", "tcm"]
    steps = [recipe_of(race, stage)[0].method.steps for stage in race.stages("pd")]
    assert steps == [32, 16, 8, 4, 2, 1]


def test_a_row_has_means_over_seeds_and_dashes_where_nothing_was_measured() -> None:
    run = {"images": 100, "cpu_seconds": 60.0, "memory": 400.0, "class_accuracy": {"1": 0.5, "2": 0.75}}
    runs = [run | {"fd_tiles": {"1": fd, "2": 2 * fd}} for fd in (1.0, 3.0)]
    cells = row("scd", runs, Race("tiles", Path()).metrics).strip("| ").split(" | ")
    assert cells[:8] == ["`scd`", "2", "100", "2", "400", "1.00", "2 ± 1.4", "4 ± 2.8"]
    assert cells[8:] == ["-", "-", "0.500", "0.750", "-", "-"]


def test_large_distances_have_no_exponent() -> None:
    assert cell([2440.0], ".3g") == "2440"
    assert cell([209.0, 583.0], ".3g") == "396 ± 260"


def test_the_plot_has_a_curve_a_method_of_means_and_deviations() -> None:
    results = {
        "one": [{"fd_tiles": {"1": 40.0}}],
        "many": [{"fd_tiles": {str(n): 80.0 / n for n in NFE}}, {"fd_tiles": {str(n): 160.0 / n for n in NFE}}],
    }
    drawn = chart(results, "tiles")
    assert drawn.title.startswith("tiles-FD")
    one, many = drawn.curves
    assert (one.name, one.points, one.deviations) == ("one", [(1.0, 40.0)], {})
    assert many.points == [(n, 120.0 / n) for n in NFE]
    assert many.deviations == pytest.approx({n: 80.0 / n / 2**0.5 for n in NFE})
    assert one.style != many.style
