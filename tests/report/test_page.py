"""The report: one page that needs nothing but itself, whatever the run has left."""

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
from report_runs import Outline, cells

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable
from edmdistill.recipes.library import find_recipe, load_recipe
from edmdistill.report.page import report
from edmdistill.report.summary import read_run


def table(name: str, claim: str = "", cell: str = "1.5") -> ResultTable:
    rows = [["", "NFE", "digits-FD"], ["teacher", "35", cell]]
    return ResultTable(
        PROTOCOLS[name],
        rows,
        claim,
        {"generator": [(1, 9.0), (4, 5.0)], "teacher": [(3, 551.0), (35, 5.0)]},
        "digits-FD",
    )


def pictures(page: str) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in re.findall(r'base64,[\w+/=]+" width="(\d+)" height="(\d+)"', page)]


def test_the_page_is_whole_and_needs_nothing_else(full: Path):
    swept = table("digits", "It is best without noise.")
    page = report(read_run(full), [table("digits", "It is good."), table("pixels")], [swept])
    outline = Outline(page)
    assert outline.count("table") == 6
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Quality by number of evaluations",
        "Quality by number of evaluations and gamma",
        *("Samples", "Training", "Plan and run", "Environment", "Recipe", "Commands"),
    ]
    assert "It is best without noise." in page
    assert "@media print" in page
    outline.require_nothing_else()
    assert "$" not in page
    assert "prefers-color-scheme: dark" in page
    assert "https://a.b/&lt;teacher&gt;.pkl" in page
    assert "if a &lt; b &amp; c: &lt;script&gt;" in page
    for said in ("It is good.", "cosim/digits-quickstart, seed 0, hash", "1,000 images seen.", "cc-by-nc-sa-4.0"):
        assert said in page
    assert "unfinished" not in page
    for section in re.findall(r"<section>(.*?)</section>", page, re.DOTALL):
        if "<table" in section:
            assert len(re.findall('<div class="scroll( values)?"><table>', section)) == section.count("<table")


def test_grids_are_from_the_first_to_the_last_and_what_was_drawn(full: Path):
    for images in range(10, 250, 10):
        (full / "samples" / f"{images:09d}.png").write_bytes((full / "samples" / "000000000.png").read_bytes())
    page = report(read_run(full), [])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    shown = ["0", "50", "110", "160", "220", "1,000"]
    assert captions == [*(f"after {images} images" for images in shown), "sampled into images"]
    assert pictures(page) == [(338, 270)] * 6 + [(1200, 40)]
    assert '<div class="steps"><span>1</span><span>2</span><span>4</span><span>8</span></div>' in page


def test_curves_come_in_order_and_without_what_is_no_number(full: Path):
    page = report(read_run(full), [])
    assert re.findall(r'aria-label="(.*?)"', page) == [
        "loss, generator",
        "score gap",
        "images per second",
        "own signal",
    ]
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", page).lower()


def test_what_is_known_of_a_run(full: Path):
    config = json.loads((full / "generator" / "config.json").read_text())
    (full / "generator" / "config.json").write_text(json.dumps(config | {"images_seen": 500}))
    page = report(read_run(full), [])
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Time"] == "10 seconds, 100 images per second"
    assert facts["Source"] == "https://a.b/&lt;teacher&gt;.pkl, sha256 121212121212"
    assert facts["Data"] == "digits: 1,500 images, 8x8, 10 classes"
    assert facts["Network"] == "edm2, preconditioned as edm"
    assert ", seed 0, hash " in facts["Recipe"]
    assert "Initialized from" not in facts
    began = config["provenance"] | {"init": "34" * 32, "guide": "56" * 32}
    (full / "generator" / "config.json").write_text(json.dumps(config | {"provenance": began}))
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", report(read_run(full), [])))
    assert facts["Initialized from"] == "a generator with sha256 343434343434"
    assert facts["Guide"] == "a network with sha256 565656565656"
    (full / "generator" / "config.json").write_text(json.dumps(config | {"images_seen": 500}))
    assert "Trained on digits, 1,000 images seen." in page, "by the metrics, which go on after a checkpoint"
    assert "<h1>A generator by cosim, from https://a.b/&lt;teacher&gt;.pkl</h1>" in page
    (full / "metrics.jsonl").unlink()
    later = report(read_run(full), [])
    assert "500 images seen of 1,000: the run is unfinished" in later
    assert "<dt>Time" not in later


def test_what_is_missing_is_said(bare: Path):
    page = report(read_run(bare), [])
    Outline(page)
    for sentence in (
        *("Nothing is measured yet.", "Nothing is sampled yet.", "Nothing is logged yet.", "unfinished"),
        *("There is no checkpoint yet", "no record of its environment"),
    ):
        assert sentence in page


def test_a_line_without_what_every_line_has_is_left_out(bare: Path, capsys: pytest.CaptureFixture[str]):
    (bare / "metrics.jsonl").write_text('{"images": 8, "loss": 1.0}\n{"images": 16, "seconds": 1.0}\n')
    assert [line["images"] for line in read_run(bare).metrics] == [16]
    assert "metrics.jsonl: line 1 is damaged and is skipped" in capsys.readouterr().err


def test_a_line_just_being_written_is_left_out(full: Path):
    with (full / "metrics.jsonl").open("a") as file:
        file.write('{"images": 10')
    assert read_run(full).metrics[-1]["images"] == 1000


def test_the_commands_are_those_of_the_run(bare: Path):
    page = report(read_run(bare), [])
    lines = re.findall("<code>(.*?)</code>", page.partition("<h2>Commands</h2>")[2])
    sample, evaluate, sweep, teacher, train = (shlex.split(unescape(line))[1:] for line in lines)
    run = str(bare)
    assert sample == ["sample", run, "--nfe", "2", "--seeds", "0-63", "--out", f"{run}/images"]
    assert evaluate == [
        *("eval", run, "--nfe", "1,2,4,8", "--protocol", "digits"),
        *("--out", f"{run}/eval/generator.json"),
    ]
    assert sweep == [
        *("sweep", run, "--nfe", "1,2,4,8", "--gamma", "0,.5,1", "--protocol", "digits"),
        *("--out", f"{run}/eval/sweep.json"),
    ]
    assert teacher == ["eval", "TEACHER", "--protocol", "digits", "--out", f"{run}/eval/teacher.json"]
    assert train == [
        *("train", "cosim", "TEACHER", "--data", "digits", "--recipe", "cosim/digits-quickstart"),
        *("--set", "training.images=1000", "--set", "training.betas=[0.0, 0.9]", "--run-dir", run),
    ]


def test_a_setting_further_down_the_recipe_is_a_comment(bare: Path):
    """Only the lines below the first are the command's; the rest is the author's text."""
    (bare / "recipe.toml").write_text("# Trained by --recipe a\n#   --set b.c=1\n\n#   --set d.e=2\n[training]\n")
    assert read_run(bare).train_arguments == ["--recipe", "a", "--set", "b.c=1"]


def test_results_are_of_the_recipe_and_the_images_seen(full: Path):
    run = read_run(full)
    assert run.generator == (run.recipe.hash, 1000)
    (full / "generator" / "config.json").unlink()
    assert read_run(full).generator == (run.recipe.hash, 0)


def test_the_recipe_of_a_library_call_is_the_file_in_the_run(bare: Path):
    (bare / "recipe.toml").write_text("[training]\n")
    assert read_run(bare).train_arguments == ["--recipe", str(bare / "recipe.toml")]


def test_the_plan_stands_beside_what_was_measured(full: Path):
    page = report(read_run(full), [])
    rows = cells(page, "Plan and run")
    assert rows["Peak memory"][1] == "250.0 MB"
    assert rows["Images per second"][1] == "100"  # 1000 images in 10 seconds
    assert rows["Time for all images"][1] == "10 seconds"
    size, unit = rows["Peak memory"][0].split()
    parts = [cell[0] for name, cell in rows.items() if name.startswith("  ")]
    assert {part.split()[1] for part in parts} | {unit} == {"MB"}
    assert float(size) == pytest.approx(sum(float(part.split()[0]) for part in parts), abs=0.3)
    (turn,) = (name for name in rows if "turn" in name)
    assert turn.endswith("8 images")  # of the last session
    assert "35% of the peak throughput of a h100" in page


def test_an_environment_is_told_once(full: Path):
    rows = cells(report(read_run(full), []), "Environment")
    assert rows[""] == ["from the start", "after 800 images"]
    assert rows["Resumed"] == ["once after 500 images", "never"]
    assert rows["Revision"] == ["a" * 40, "unknown"]
    assert rows["Options"] == ["none", "--micro-batch 8"]


def test_the_recipe_says_who_says_what(bare: Path):
    text = recipe_text("cosim/digits")
    (bare / "recipe.toml").write_text(
        f"# Trained by --recipe cosim/digits-quickstart\n#   --set training.images=1000\n\n{text}"
    )
    rows = cells(report(read_run(bare), []), "Recipe")
    assert rows[""] == ["value", "set by", "instead of"]
    assert rows["training.images"] == ["1000", "--set", "9600 (variant quickstart),\n36000 (file)"]
    assert rows["method.trajectory_steps"] == ["8", "variant quickstart", "12 (file),\n0 (default)"]
    two = load_recipe("cosim/digits-quickstart").sampling.sigmas["2"]
    assert rows["sampling.sigmas"][0].splitlines()[0] == f"2: {list(two)}"
    assert "training.seed" not in rows


def recipe_text(name: str) -> str:
    return find_recipe(name).text


def test_a_teacher_in_training_has_a_page_too(full: Path):
    recipe = load_recipe("diffusion/digits", "diffusion")
    (full / "recipe.resolved.json").write_bytes(recipe.to_json())
    (full / "recipe.toml").write_text(recipe_text("diffusion/digits"))
    config = json.loads((full / "generator" / "config.json").read_text())
    (full / "generator" / "config.json").write_text(json.dumps(config | {"stage": "teacher"}))
    page = report(read_run(full), [])
    assert "<h1>A teacher by diffusion, from digits</h1>" in page, "whatever its checkpoint says of a source"
    assert "train diffusion --data digits" in page
    assert not {"TEACHER", "sweep"} & set(re.findall(r"\w+", page))


def test_no_run_directory(tmp_path: Path):
    with pytest.raises(EdmDistillError, match=r"is not a run directory, because it has no recipe\.resolved\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{}"),
        ("run.json", "["),
        ("run.json", None),
        ("recipe.toml", "[training"),
        pytest.param("recipe.toml", f"a = {'[' * 100_000}", id="nested"),
    ],
)
def test_a_damaged_run_directory(bare: Path, name: str, text: str | None):
    if text is None:
        (bare / name).unlink()
    else:
        (bare / name).write_text(text)
    with pytest.raises(EdmDistillError, match="is a damaged run directory"):
        read_run(bare)
