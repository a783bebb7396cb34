"""The report: a run and its measurements on one page of HTML that needs nothing but itself.

Pictures are inside as base64 and curves as SVG; there is no script. What a run lacks is said in a sentence on the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from html import escape
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import msgspec
from PIL import Image

from edmdistill.checkpoints.store import CONFIG, CheckpointConfig, read_config
from edmdistill.curves import Axis, Point, alone, doublings, save_plot, svg_curves
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import Generator, Table
from edmdistill.methods.base import Method
from edmdistill.recipes import Recipe
from edmdistill.training.metrics import BINS
from edmdistill.training.run_dir import RECIPE, RUN

PAGE = Path(__file__).parent / "assets" / "report.html"
WIDEST = 1200  # pixels; a larger grid is made smaller
CURVES = {
    "loss": "loss",
    "score_gap": "score gap",
    "cos_gap_error": "cosine of gap and error",
    "grad_norm": "gradient norm",
    "diversity": "diversity",
    "mean": "mean",
    "deviation": "standard deviation",
    "images_per_second": "images per second",
    "lr": "learning rate",
}
"""Titles of what metrics.jsonl holds, in the order of the page; what else it holds comes last."""


class Summary(NamedTuple):
    """What a run directory says of its run.

    Attributes:
        asked: the recipe and the overrides as arguments of `train`.
        data: of run.json.
        config: of the checkpoint that the run has left, if it has.
        metrics: the lines of metrics.jsonl.
    """

    path: Path
    recipe: Recipe
    asked: list[str]
    data: dict[str, Any]
    config: CheckpointConfig | None
    metrics: list[dict[str, float]]

    @property
    def images(self) -> int:
        """Images seen by the checkpoint."""
        return (self.config.images_seen if self.config else None) or 0

    @property
    def generator(self) -> Generator:
        return Generator(self.recipe.hash, self.images)


# Reading.


def read_run(path: Path) -> Summary:
    """The run in a directory; it may be under way.  Raises: EdmDistillError: no run directory, or a damaged one."""
    if not (path / RECIPE).is_file():
        raise EdmDistillError(f"{path} is no run directory, for it has no {RECIPE}: give the --run-dir of a training")
    generator, log = path / "generator", path / "metrics.jsonl"
    try:
        lines = log.read_bytes().rpartition(b"\n")[0] if log.exists() else b""  # the last may just be being written
        return Summary(
            path,
            Recipe.from_json((path / RECIPE).read_bytes()),
            _asked(path / "recipe.toml"),
            msgspec.json.decode((path / RUN).read_bytes())["data"],
            read_config(generator) if (generator / CONFIG).exists() else None,
            [json.loads(line) for line in lines.splitlines()],
        )
    except (OSError, KeyError, ValueError) as error:
        raise EdmDistillError(f"{path} is a damaged run directory ({error}): train again in another") from error


def _asked(file: Path) -> list[str]:
    """What `train` notes above the recipe's own text; without such a note, the file itself is the recipe."""
    head, mark = "# Trained by --recipe ", "#   --set "
    first, *lines = file.read_text("utf-8").splitlines() or [""]
    if not first.startswith(head):
        return ["--recipe", str(file)]
    sets = (line.removeprefix(mark) for line in takewhile(lambda line: line.startswith(mark), lines))
    return ["--recipe", first.removeprefix(head), *(word for override in sets for word in ("--set", override))]


# The page.


def report(run: Summary, measured: Sequence[Table]) -> str:
    """The page.  Args: measured: what `tables` made of the run's results."""
    own, total = run.recipe.method_class, run.recipe.training.images
    origin = run.config.provenance.source if run.config and own.product != "teacher" else run.data["name"]
    images = int(run.metrics[-1]["images"]) if run.metrics else run.images
    seen = f"{images:,} images seen" + ("" if images >= total else f" of {total:,}: the run is not finished")
    commands = _commands(run)
    sections = {
        "Quality by number of evaluations": "".join(map(_measured, measured))
        or f"<p>Nothing is measured yet. This measures:</p>{_code(commands[1])}",
        "Samples": _samples(run),
        "Training": _training(run.metrics),
        "Recipe": _recipe(run),
        "To go on": f"<p>To draw, to measure, and to train again or go on:</p>{_code(*commands)}",
    }
    return Template(PAGE.read_text("utf-8")).substitute(
        title=escape(f"A {own.product} by {run.recipe.method['name']}, from {origin}"),
        lead=escape(f"{about(own)} Trained on {run.data['name']}, {seen}."),
        claims="".join(f'<p class="claim">{escape(table.claim)}</p>' for table in measured if table.claim),
        facts="".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in _facts(run).items()),
        sections="".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections.items()),
    )


def about(method: type[Method]) -> str:
    """A method in a sentence: the first of its file."""
    return (sys.modules[method.__module__].__doc__ or "").split("\n\n")[0]


def draw(table: Table, source: str, file: Path, kind: str) -> None:
    """Draws a table's curves, the first metric by NFE.

    Args:
        source: what was measured, as a page calls it.
        kind: .svg, .html, .png or .pdf; a page holds the table as well.
    Raises: EdmDistillError: a format that takes matplotlib, where there is none.
    """
    title = f"{table.metric} by NFE"
    if kind in (".png", ".pdf"):
        save_plot(file, title, table.curves, doublings(table.curves), kind)
        return
    page = PAGE.read_text("utf-8")
    if kind == ".svg":
        style = page.partition("<style>")[2].partition("</style>")[0]
        text = alone(_chart_by_nfe(table), style)
    else:
        text = Template(page).substitute(
            title=escape(f"{source}: {title}"),
            lead="",
            claims=f'<p class="claim">{escape(table.claim)}</p>',
            facts="",
            sections=f"<section>{_measured(table)}</section>",
        )
    file.write_text(text, encoding="utf-8")


def _facts(run: Summary) -> dict[str, str]:
    size, classes = run.data["resolution"], run.data["classes"]
    facts = {
        "Recipe": f"{run.asked[1]}, hash {run.recipe.hash:.12}",
        "Data": f"{run.data['name']}: {run.data['images']:,} images, {size}x{size}, {classes or 'no'} classes",
    }
    if run.config:
        origin = run.config.provenance
        facts |= {
            "Source": origin.source + (f", sha256 {origin.sha256:.12}" if origin.sha256 else ""),
            "Licence": origin.licence or "not known",
            "Network": f"{run.config.network.kind}, preconditioned as {run.config.preconditioning['kind']}",
        }
    if run.metrics:
        images, seconds = run.metrics[-1]["images"], run.metrics[-1]["seconds"]
        facts["Time"] = f"{seconds / 60:.1f} minutes, {images / seconds:.3g} images a second"
    return facts


def _measured(table: Table) -> str:
    head, *rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
    chart = _chart_by_nfe(table) if table.curves else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="measured"><div><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_note(table.caption)}</div>{chart}</div>"
    )


def _chart_by_nfe(table: Table) -> str:
    return svg_curves(f"{table.metric} by NFE", table.curves, doublings(table.curves), log=True)


def _samples(run: Summary) -> str:
    """The first, the middle and the last grid of the run, and what was drawn into a folder of it afterwards."""
    files = sorted((run.path / "samples").glob("*.png"))
    steps = "".join(f"<span>{nfe}</span>" for nfe in run.recipe.sampling.nfe)
    figures = [
        (f"after {int(files[i].stem):,} images", f'<div class="steps">{steps}</div>{_picture(files[i])}')
        for i in sorted({0, len(files) // 2, len(files) - 1})
        if files
    ]
    figures += [
        (f"x0 after {int(file.stem):,} images: the same noisy data as each role sees it", _picture(file))
        for file in sorted((run.path / "x0").glob("*.png"))[-1:]
    ]
    figures += [(f"{file.parent.name}/{file.name}", _picture(file)) for file in sorted(run.path.glob("*/grid.png"))]
    if not figures:
        return "<p>Nothing is drawn yet.</p>"
    body = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{content}</figure>" for name, content in figures)
    note = "Over training always the same seeds; at the left of the rows, the number of network evaluations."
    return f'{_note(note)}<div class="figures">{body}</div>'


def _picture(file: Path) -> str:
    with Image.open(file) as image:
        image.thumbnail((WIDEST, 10 * WIDEST))
        image.save(data := io.BytesIO(), "png", optimize=True)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{text}" width="{image.width}" height="{image.height}" alt="Samples">'


def _training(metrics: Sequence[Mapping[str, float]]) -> str:
    if not metrics:
        return "<p>Nothing is logged yet.</p>"
    total, order = metrics[-1]["images"], list(CURVES)
    charts: dict[str, dict[str, list[Point]]] = {}
    for line in metrics:
        for key in line.keys() - {"images", "step", "seconds"}:
            if math.isfinite(line[key]):
                chart, curve = _chart(key)
                charts.setdefault(chart, {}).setdefault(curve, []).append((line["images"], line[key]))

    def place(chart: str) -> tuple[int, str]:
        kind = chart.partition("/")[0]
        return order.index(kind) if kind in order else len(order), chart

    def rank(curve: str) -> int:
        return BINS.index(f"sigma{curve}") if f"sigma{curve}" in BINS else -len(curve)

    def draw(chart: str) -> str:
        kind, *about = chart.split("/")
        curves = {name: charts[chart][name] for name in sorted(charts[chart], key=rank)}
        return svg_curves(", ".join([CURVES.get(kind, kind), *about]), curves, Axis([0, total / 2, total]))

    note = "Against images seen."
    if "score_gap" in charts:
        note += (
            " The generator's loss swings about 0 and says little; the score gap, how far the auxiliary score is from"
            " the teacher's, says more."
        )
    return f'{_note(note)}<div class="figures">{"".join(map(draw, sorted(charts, key=place)))}</div>'


def _chart(measure: str) -> tuple[str, str]:
    """The chart that a measure is drawn in, and its curve there."""
    kind, *about = measure.split("/")
    if kind in ("generated", "data"):
        what, channel = about
        return f"{'mean' if what == 'mean' else 'deviation'}/channel {channel}", kind
    if about and about[-1] in BINS:
        return "/".join([kind, *about[:-1], "sigma"]), about[-1].removeprefix("sigma")
    return measure, ""


def _recipe(run: Summary) -> str:
    given = (run.path / "recipe.toml").read_text("utf-8")
    whole = msgspec.json.format(msgspec.json.encode(run.recipe), indent=2).decode()
    summary = "With its variant, the overrides and every default"
    return f"{_code(given)}<details><summary>{summary}</summary>{_code(whole)}</details>"


def _commands(run: Summary) -> list[str]:
    """To draw, to measure, and to train again or go on."""
    path, nfe, data = str(run.path), run.recipe.sampling.nfe, run.data["name"]
    fits = [name for name, protocol in PROTOCOLS.items() if protocol.reference and protocol.reference.source == data]
    measure = ["--protocol", fits[0]] if fits else ["--protocol", "pixels", "--ref", "DATA"]
    given = [] if run.recipe.network else ["TEACHER"]
    given += ["--data", data if fits else "DATA", *run.asked]
    commands = [
        ["sample", path, "--nfe", str(nfe[0]), "--seeds", "0-63", "--out", str(run.path / "images")],
        ["eval", path, "--nfe", ",".join(map(str, nfe)), *measure, "--out", str(run.path / "eval" / "generator.json")],
        ["train", run.recipe.method["name"], *given, "--run-dir", path],
    ]
    return [shlex.join(["edmdistill", *command]) for command in commands]


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _code(*lines: str) -> str:
    return f'<pre class="scroll">{escape(chr(10).join(lines))}</pre>'
