"""The report: one page that needs nothing but itself, whatever the run has left."""

import json
import math
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable
from edmdistill.recipes.library import find_recipe, load_recipe
from edmdistill.report.page import report
from edmdistill.report.summary import read_run

SMALL = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 8, "channel_mult": [1]} | {
    "num_blocks": 1,
    "attn_resolutions": [],
}
SESSION = {
    "images": 0,
    "began": "2026-11-21T09:10:11+00:00",
    "edmdistill": "0.1",
    "revision": "a" * 40,
    "python": "3.11",
    "torch": "2.13",
    "cuda": "13.0",
    "system": "Linux",
    "device": "NVIDIA H100 80GB HBM3",
    "device_memory": 85_000_000_000,
    "processes": 1,
    "micro_batch": None,
    "shard": False,
    "offload": [],
    "checkpointing": False,
}
VOID = {"meta", "img", "path", "circle", "polygon", "polyline"}


class Outline(HTMLParser):
    """Every tag with its attributes; fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run directory before its first round."""
    run = tmp_path / "my run"
    (run / "samples").mkdir(parents=True)
    recipe = load_recipe("cosim/digits-quickstart", "cosim", ["training.images=1000"])
    (run / "recipe.resolved.json").write_bytes(recipe.to_json())
    (run / "recipe.toml").write_text(
        "# Trained by --recipe cosim/digits-quickstart\n#   --set training.images=1000\n"
        "#   --set training.betas=[0.0, 0.9]\n\n# if a < b & c: <script>\n[method]\n"
    )
    data = {"name": "digits", "images": 1500, "resolution": 8, "channels": 1, "classes": 10}
    (run / "run.json").write_text(json.dumps({"teacher_sha256": "ab" * 32, "data": data}))
    return run


@pytest.fixture
def full(bare: Path) -> Path:
    """A finished one: metrics, samples, a checkpoint."""
    lines = [
        {"images": i * 10, "step": i, "seconds": i / 10, "images_per_second": 100.0, "loss/generator": (-1.0) ** i}
        | {"memory": 250_000_000, "score_gap": 1 / i, "own_signal": math.nan if i == 3 else 1.0}
        for i in range(1, 101)
    ]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for images in (0, 250, 500, 750, 1000):
        Image.fromarray(np.full((270, 338), images // 4, np.uint8)).save(bare / "samples" / f"{images:09d}.png")
    Image.fromarray(np.zeros((100, 3000, 3), np.uint8)).save(bare / "images-grid.png")
    config = CheckpointConfig(
        stage="generator",
        network=NetworkSpec("edm2", SMALL),
        preconditioning={"kind": "edm"},
        c_noise="log(sigma)/4",
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
        label_dim=10,
        two_time=False,
        images_seen=1000,
        provenance=Provenance(source="https://a.b/<teacher>.pkl", sha256="12" * 32, licence="cc-by-nc-sa-4.0"),
    )
    sessions = [SESSION, SESSION | {"images": 500}, SESSION | {"images": 800, "revision": None, "micro_batch": 8}]
    (bare / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    (bare / "generator").mkdir()
    (bare / "generator" / "config.json").write_bytes(msgspec.json.encode(config))
    return bare


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
    assert outline.count("script") == outline.count("link") == 0
    for tag, attributes in outline.tags:
        assert not attributes.keys() & {"href", "srcset", "onload", "style"}
        assert attributes.get("src", "data:") is not None
        assert attributes.get("src", "data:").startswith("data:"), tag
    assert "url(" not in page
    assert "@import" not in page
    assert "$" not in page
    assert "prefers-color-scheme: dark" in page
    assert "https://a.b/&lt;teacher&gt;.pkl" in page
    assert "if a &lt; b &amp; c: &lt;script&gt;" in page
    for said in ("It is good.", "cosim/digits-quickstart, hash", "1,000 images seen.", "cc-by-nc-sa-4.0"):
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


def test_what_is_missing_is_said(bare: Path):
    page = report(read_run(bare), [])
    Outline(page)
    for sentence in (
        *("Nothing is measured yet.", "Nothing is sampled yet.", "Nothing is logged yet.", "unfinished"),
        *("There is no checkpoint yet", "no record of its environment"),
    ):
        assert sentence in page


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


def test_the_recipe_of_a_library_call_is_the_file_in_the_run(bare: Path):
    (bare / "recipe.toml").write_text("[training]\n")
    assert read_run(bare).train_arguments == ["--recipe", str(bare / "recipe.toml")]


def cells(page: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's table, by their first cell."""
    body = page.partition(f"<h2>{section}</h2>")[2].partition("</section>")[0]
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr>(.*?)</tr>", body, re.DOTALL)]
    return {unescape(first): [unescape(cell) for cell in rest] for first, *rest in rows}


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


def test_a_teacher_in_training_has_a_page_too(bare: Path):
    recipe = load_recipe("diffusion/digits", "diffusion")
    (bare / "recipe.resolved.json").write_bytes(recipe.to_json())
    (bare / "recipe.toml").write_text(recipe_text("diffusion/digits"))
    page = report(read_run(bare), [])
    assert "<h1>A teacher by diffusion, from digits</h1>" in page
    assert "train diffusion --data digits" in page
    assert not {"TEACHER", "sweep"} & set(re.findall(r"\w+", page))


def test_no_run_directory(tmp_path: Path):
    with pytest.raises(EdmDistillError, match=r"is not a run directory, because it has no recipe\.resolved\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("run.json", "{}"), ("run.json", "[")])
def test_a_damaged_run_directory(bare: Path, name: str, text: str):
    (bare / name).write_text(text)
    with pytest.raises(EdmDistillError, match="is a damaged run directory"):
        read_run(bare)
