"""The table of methods: what each contestant trains by on either set, and what is printed and drawn of its runs."""

import re
import shutil
from pathlib import Path

import pytest
from digits_methods import CONTESTANTS, NFE, Race, cell, chart, draw, heading, recipe_of, row

from edmdistill.defaults import defaults
from edmdistill.embedded import EMBEDDED

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


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


def test_a_row_of_the_table_is_a_curve() -> None:
    metrics = Race("tiles", Path()).metrics
    common = {"images": 100, "cpu_seconds": 60.0, "memory": 400.0, "class_accuracy": {}}
    pairs = [common | {"fd_tiles": {str(n): fd / n for n in NFE}} for fd in (80.0, 160.0)]
    rows = [row("kd", [common | {"fd_tiles": {"1": 40.0}}], metrics), row("scd", pairs, metrics)]
    page = "\n".join([*heading(), *rows, "", "![FD](methods-tiles.svg)", ""])
    kd, scd = chart(page, "tiles").curves
    assert (kd.name, kd.points, kd.deviations) == ("kd", [(1.0, 40.0)], {})
    assert (scd.name, scd.points) == ("scd", [(n, 120.0 / n) for n in NFE])
    assert scd.deviations == {1.0: 57.0, 2.0: 28.0, 4.0: 14.0, 8.0: 7.1}
    assert kd.style != scd.style


def test_a_page_without_the_picture_is_told() -> None:
    with pytest.raises(SystemExit, match=r"no table stands above a picture methods-tiles\.svg"):
        chart("| `kd` |\n\n![FD](methods-digits.svg)\n", "tiles")


@pytest.mark.parametrize("data", EMBEDDED)
def test_the_pictures_in_docs_are_those_of_the_tables(data: str, tmp_path: Path) -> None:
    page = Path(shutil.copy(DOCS / "methods.md", tmp_path))
    draw(page, data)
    new, kept = ((folder / f"methods-{data}.svg").read_text("utf-8") for folder in (tmp_path, DOCS))
    told = f"python benchmarks/digits_methods.py --data {data} --plot docs/methods.md"
    assert NUMBER.sub("", new) == NUMBER.sub("", kept), told
    numbers = [[float(number) for number in NUMBER.findall(svg)] for svg in (new, kept)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=0.11), told  # a last digit, rounded otherwise
