"""Runs side by side: what each measured while it trained, and its newest samples, in one page."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from report_runs import SESSION, Outline

from edmdistill.evaluation.compare import Row, compare
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import Result
from edmdistill.recipes.library import load_recipe
from edmdistill.report.compared_runs import ComparedRun, device_hours, newest_samples, quality_while_training, runs_of
from edmdistill.report.comparison import lines_of
from edmdistill.report.page import draw_comparison
from edmdistill.report.summary import read_run
from edmdistill.sampling.spec import SamplerRecord
from edmdistill.training.metrics import metric_and_nfe, quality_name

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(bare: Path) -> MakeRun:
    def make(name: str, values: Mapping[int, float], *sessions: Mapping[str, Any], **table: Any) -> Path:
        """A run with a metric at some images seen, a thousand of which take an hour, and a grid of each."""
        folder = shutil.copytree(bare, bare.parent / name)
        asked = {"protocol": "digits", "every": 3200} | table
        sets = [f"evaluation.{key}={json.dumps(value)}" for key, value in asked.items()]
        recipe = load_recipe("cosim/digits-quickstart", "cosim", sets)
        (folder / "recipe.resolved.json").write_bytes(recipe.to_json())
        lines = [
            {"images": images, "seconds": 3.6 * images, quality_name("fd_digits", 2): value}
            for images, value in values.items()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "sessions.jsonl").write_text("".join(json.dumps(SESSION | session) + "\n" for session in sessions))
        for images in values:
            Image.fromarray(np.full((8, 16), images % 256, np.uint8)).save(folder / "samples" / f"{images:09d}.png")
        return folder

    return make


def compared(*folders: Path) -> list[ComparedRun]:
    return [ComparedRun(folder.name, read_run(folder), style) for style, folder in enumerate(folders)]


def titles(text: str) -> list[str]:
    return re.findall('aria-label="(.*?)"', text)


def result(nfe: int, value: float) -> Result:
    return Result(
        metrics={"fd_digits": value, "class_accuracy": 0.5},
        protocol=PROTOCOLS["digits"],
        protocol_sha256="same",
        sampler=SamplerRecord(solver="gamma", nfe=nfe, gamma=1.0),
        provenance={},
    )


def test_a_quality_has_a_name_of_its_own():
    assert metric_and_nfe(quality_name("fd_digits@64", 35)) == ("fd_digits@64", 35)
    for other in ("loss/generator", "jump/80", "lr/generator", "NFE", "fd/two NFE", "fd/2"):
        assert metric_and_nfe(other) is None


def test_quality_is_drawn_by_images_and_by_device_hours(make_run: MakeRun):
    first = make_run("a", {500: 9.0, 1000: 3.0}, {"processes": 1})
    second = make_run("b", {500: 8.0, 2000: 2.0}, {"processes": 2, "device": "TPU"})
    text = quality_while_training(compared(first, second))
    by_images, by_hours = text.split("<svg")[1:]
    assert titles(text) == ["digits-FD in 2 NFE, by images seen", "digits-FD in 2 NFE, by device hours"]
    for chart in (by_images, by_hours):
        assert chart.count("<polyline") == 2
        assert chart.count('class="mark"') == 4
        assert re.findall('class="label".*?>(.*?)<', chart) == ["a", "b"]
    assert "NVIDIA H100 80GB HBM3 (a); TPU (b)" in text
    assert ">2k</text>" in by_images
    assert ">4</text>" in by_hours, "two hours on two devices"
    assert "device hour" not in quality_while_training(compared(make_run("c", {500: 8.0})))


def test_a_device_hour_is_one_of_a_process(make_run: MakeRun):
    run = read_run(make_run("a", {500: 1.0, 1000: 1.0, 2000: 1.0}, {"processes": 1}, {"processes": 4, "images": 1000}))
    assert device_hours(run) == pytest.approx([0.5, 1.0, 5.0])
    assert device_hours(run._replace(sessions=[])) == []


def test_what_was_not_measured_alike_has_charts_of_its_own(make_run: MakeRun):
    runs = compared(make_run("a", {500: 9.0}), make_run("b", {500: 8.0}), make_run("c", {500: 7.0}, ref="real.npz"))
    text = quality_while_training(runs)
    assert titles(text) == [
        "digits-FD in 2 NFE, protocol digits, by images seen",
        "digits-FD in 2 NFE, against real.npz, by images seen",
    ]
    assert [chart.count("<polyline") for chart in text.split("<svg")[1:]] == [2, 1]


def test_runs_that_measured_nothing_have_no_charts(full: Path):
    assert quality_while_training(compared(full)) == ""


def test_the_newest_grids_are_side_by_side(make_run: MakeRun):
    text = newest_samples(compared(make_run("a", {500: 9.0, 1000: 3.0}), make_run("b", {500: 8.0}), make_run("c", {})))
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == ["a, after 1,000 images", "b, after 500 images"]
    assert text.count("<img") == 2
    assert newest_samples(compared(make_run("d", {}))) == ""


def test_a_run_has_the_color_of_its_results(make_run: MakeRun, tmp_path: Path):
    runs = [make_run(name, {500: 1.0}) for name in "ab"]
    rows = [Row("t.json", result(1, 1.0))]
    rows += [Row(str(runs[i]), result(nfe, 2.0), runs[i]) for i in (1, 0, 1) for nfe in (1, 2)][:4]
    table = compare(rows)
    assert [(run.name, run.style) for run in runs_of(table, lines_of(table))] == [("b", 1), ("a", 2)]
    assert runs_of(compare([Row("x", result(1, 1.0), tmp_path)]), []) == [], "a checkpoint is no run"


def test_the_page_is_whole_and_needs_nothing_else(make_run: MakeRun, tmp_path: Path):
    hostile = '<b onclick="x">$&'
    folders = [make_run(name, {500: 3.0, 1000: 2.0}, {"processes": 1}) for name in ("a", hostile)]
    rows = [Row(str(folder), result(nfe, 4.0 / nfe), folder) for folder in folders for nfe in (1, 2)]
    rows += [Row("images", replace(result(1, 1.0), sampler=None))]
    file = tmp_path / "page.html"
    assert draw_comparison(compare(rows), file, ".html").endswith("not known: images.")
    page = file.read_text()
    outline = Outline(page)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Quality by number of evaluations",
        "Quality while training",
        "Samples",
    ]
    assert titles(page) == [
        *("digits-FD by NFE", "class accuracy by NFE"),
        *("digits-FD in 2 NFE, by images seen", "digits-FD in 2 NFE, by device hours"),
    ]
    assert outline.count("img") == 2
    assert page.count("<tr>") == 1 + len(rows)
    assert "Not drawn, as the number of evaluations is not known: images." in page
    assert "<b " not in page
    assert "&lt;b onclick=&quot;x&quot;&gt;$&amp;" in page
    outline.require_nothing_else()


def test_a_page_without_runs_has_its_charts_alone(tmp_path: Path):
    draw_comparison(compare([Row("a", result(2, 1.0))]), tmp_path / "page.html", ".html")
    page = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Quality by number of evaluations"]
    assert "<title>Comparison of a</title>" in page


def test_many_sources_are_counted_in_the_title(tmp_path: Path):
    draw_comparison(compare([Row(f"a{i}", result(2, 1.0)) for i in range(5)]), tmp_path / "page.html", ".html")
    assert "<title>Comparison of 5 sources</title>" in (tmp_path / "page.html").read_text()
