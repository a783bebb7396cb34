"""The sections of a page, each from what it is given."""

import json
import math
import re
import shlex
from html import unescape
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from report_runs import SESSION, cells

from edmdistill.evaluation.diagnosis import Diagnosis, Gap, SingleJump
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable
from edmdistill.recipes.library import load_recipe
from edmdistill.report import sections
from edmdistill.report.curves import svg_heat_map
from edmdistill.report.summary import read_run
from edmdistill.training.metrics import BINS


def titles(text: str) -> list[str]:
    """Of the charts."""
    return re.findall('aria-label="(.*?)"', text)


def test_the_newest_diagnosis_is_shown():
    old = Diagnosis([SingleJump(80.0, 70.0, 500.0), SingleJump(0.3, 7.0, 5.0)], [])
    new = Diagnosis(
        [SingleJump(80.0, 60.0, 500.0), SingleJump(0.3, 6.0)], [Gap(0.1, 80.0, 0.4, 0.0), Gap(0.1, 0.3, 0.2, 0.5)]
    )
    lines = [{"images": 8} | old.measures(), {"images": 16} | new.measures(), {"images": 24, "loss/generator": 1.0}]
    text = sections.single_jumps(lines)
    assert "A jump is best from sigma 0.3, with a distance of 6, and worst from sigma 80, with 60." in text
    assert text.count("<circle") == 2 + 1, "the teacher's alone where it is known"
    # From sigma 0.3 to 80 there are ticks from 0.1 to 100.
    assert re.findall(r'<text x="[\d.]+" y="186" text-anchor="middle">(.*?)<', text) == ["0.1", "1", "10", "100"]
    assert svg_heat_map("score gap by s (across) and t", {(0.1, 80.0): 0.4, (0.1, 0.3): 0.2}) in text
    assert svg_heat_map("what t changes in it, as a share", {(0.1, 80.0): 0.0, (0.1, 0.3): 0.5}) in text
    alone = sections.single_jumps(lines[:1])
    assert titles(alone) == ["distance of one jump by sigma"]
    assert sections.single_jumps(lines[2:]) == ""


def test_what_is_shown_elsewhere_is_no_curve_of_training():
    diagnosis = Diagnosis([SingleJump(80.0, 60.0, 50.0)], [Gap(0.1, 80.0, 0.4, 0.0)])
    assert titles(sections.training([{"images": 8, "loss/generator": 1.0} | diagnosis.measures()])) == [
        "loss, generator"
    ]


def test_curves_of_one_kind_share_a_chart():
    line = {"images": 8, "generated/mean/0": 0.1, "data/mean/0": 0.2, "generated/std/1": 0.3, "data/std/1": 0.4}
    line |= {f"loss/generator/{name}": 5.0 for name in reversed(BINS)}
    text = sections.training([line])
    assert titles(text) == ["loss, generator, sigma", "mean, channel 0", "standard deviation, channel 1"]
    levels, *pairs = (re.findall(r'<tspan class="c\d" dx="9">(.*?)</tspan>', chart) for chart in text.split("<svg")[1:])
    assert [f"sigma{unescape(level)}" for level in levels] == BINS, "from low to high"
    assert [sorted(pair) for pair in pairs] == [["data", "generated"]] * 2
    assert "little informative" not in text
    assert "score gap" in sections.training([line | {"score_gap": 1.0}])


def test_a_table_without_curves_has_no_chart():
    table = ResultTable(PROTOCOLS["digits"], [["", "NFE"], ["images", "-"]], "", {}, "digits-FD")
    assert "<svg" not in sections.quality(table)


def test_quality_is_on_a_logarithmic_axis():
    table = ResultTable(PROTOCOLS["digits"], [], "", {"generator": [(1, 8.0), (2, 4.0), (4, 2.0)]}, "digits-FD")
    heights = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)", sections.chart_by_nfe(table).to_svg())]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_other_pictures_are_not_shown(full: Path):
    for name in ("samples/notes.png", "other.png"):
        (full / name).write_bytes((full / "samples" / "000000250.png").read_bytes())
    text = sections.samples(read_run(full))
    assert text.count("<figure>") == 5 + 1


def test_one_environment_is_one_column():
    sessions = [SESSION, SESSION | {"images": 500, "began": "2026-11-22T09:10:11+00:00", "kernels": "triton"}]
    sessions += [sessions[1] | {"images": 600, "began": "2026-11-23T09:10:11+00:00"}]
    rows = cells(f"<h2>Environment</h2>{sections.environment(sessions)}", "Environment")
    assert rows["Began"] == ["2026-11-21 09:10:11 UTC", "2026-11-22 09:10:11 UTC"]
    assert rows["Resumed"] == ["never", "once after 600 images"]
    assert rows["Device memory"] == [f"{85e9 / 2**30:.1f} GiB"] * 2
    assert rows["Options"] == ["none", "EDMDISTILL_KERNELS=triton"]


def commands(run: Path) -> dict[str, list[str]]:
    return {name: shlex.split(line) for name, line in sections.commands(read_run(run)).items()}


def test_commands_for_data_of_ones_own(bare: Path):
    facts = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_text(json.dumps(facts | {"data": facts["data"] | {"name": "mine.zip"}}))
    found = commands(bare)
    measure = ["--protocol", "pixels", "--ref", "DATA"]
    assert found["eval"][5:9] == found["teacher"][3:7] == measure
    assert found["train"][3:6] == ["TEACHER", "--data", "DATA"]


def test_commands_for_latents_decode_them(full: Path):
    config = msgspec.json.decode((full / "generator" / "config.json").read_bytes())
    config["encoder"] = {"kind": "StabilityVAEEncoder", "scale": [0.5], "bias": [0.0], "vae_name": "my/vae"}
    (full / "generator" / "config.json").write_bytes(msgspec.json.encode(config))
    found = commands(full)
    assert found["sample"][7:9] == ["--vae", "my/vae"]
    assert found["eval"][5:11] == ["--protocol", "edm2", "--ref", "IMAGES", "--vae", "my/vae"]


def test_the_first_number_of_steps_where_there_is_no_two(bare: Path):
    recipe = load_recipe("cosim/digits-quickstart")
    changed = replace(recipe, sampling=replace(recipe.sampling, nfe=(4, 1)))
    (bare / "recipe.resolved.json").write_bytes(changed.to_json())
    assert commands(bare)["sample"][3:5] == ["--nfe", "4"]
    assert commands(bare)["eval"][3:5] == ["--nfe", "4,1"]


def test_numbers_that_are_not_finite_are_left_out_of_curves():
    lines = [{"images": i, "loss/generator": value} for i, value in ((1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0))]
    assert sections.training(lines).count("<circle") == 2
