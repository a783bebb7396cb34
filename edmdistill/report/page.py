"""The page: a run and its measurements in one file of HTML that needs nothing but itself.

Pictures are inside as base64 and curves as SVG; there is no script. What a run lacks is said in a sentence on the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from edmdistill.checkpoints.documents import escape
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable
from edmdistill.methods import METHODS
from edmdistill.recipes.library import origins
from edmdistill.report.curves import Axis, Point, powers_of_two, save_matplotlib, standalone_svg, svg_curves
from edmdistill.report.plan_comparison import compare_with_plan
from edmdistill.report.summary import RunSummary
from edmdistill.training.metrics import BINS

PAGE = Path(__file__).parent.parent / "assets" / "report.html"
WIDEST = 1200  # pixels; a larger grid is made smaller
GRIDS = 6
"""Over training, the first and the last among them."""
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
"""Titles of what metrics.jsonl holds, in the order of the page; what else it holds comes last, by its own name."""


def report(run: RunSummary, measured: Sequence[ResultTable], swept: Sequence[ResultTable] = ()) -> str:
    """The page.

    Args:
        measured, swept: what `tables` and `sweeps` made of the run's results.
    """
    own, total = run.recipe.method_class, run.recipe.training.images
    fresh = own.product == "teacher" or run.recipe.network  # from data alone
    origin = run.config.provenance.source if run.config and not fresh else run.data["name"]
    images = int(run.metrics[-1]["images"]) if run.metrics else run.images
    seen = f"{images:,} images seen" + ("" if images >= total else f" of {total:,}: the run is not finished")
    commands = _commands(run)
    sections = {
        "Quality by number of evaluations": "".join(map(_measured, measured))
        or f"<p>Nothing is measured yet. This measures:</p>{_shell(commands['eval'])}",
        "Quality by number of evaluations and gamma": _swept(swept, commands),
        "Samples": _samples(run),
        "Training": _training(run.metrics),
        "Plan and run": _expected(run),
        "Environment": _environment(run.sessions),
        "Recipe": _recipe(run),
        "To go on": f"<p>To draw, to measure, and to train again or go on:</p>{_shell(*commands.values())}",
    }
    return Template(PAGE.read_text("utf-8")).substitute(
        title=escape(f"A {own.product} by {run.recipe.method_name}, from {origin}"),
        lead=escape(f"{METHODS[run.recipe.method_name].summary} Trained on {run.data['name']}, {seen}."),
        claims="".join(f'<p class="claim">{escape(table.claim)}</p>' for table in measured if table.claim),
        facts="".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in _facts(run).items()),
        sections="".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections.items() if body),
    )


def draw(table: ResultTable, source: str, file: Path, kind: str) -> None:
    """Draws a table's curves, the first metric by NFE.

    Args:
        source: what was measured, as a page calls it.
        kind: .svg, .html, .png or .pdf; a page holds the table as well.
    Raises: EdmDistillError: a format that takes matplotlib, where there is none.
    """
    title = f"{table.metric} by NFE"
    if kind in (".png", ".pdf"):
        save_matplotlib(file, title, table.curves, powers_of_two(table.curves), kind)
        return
    page = PAGE.read_text("utf-8")
    if kind == ".svg":
        style = page.partition("<style>")[2].partition("</style>")[0]
        text = standalone_svg(_chart_by_nfe(table), style)
    else:
        text = Template(page).substitute(
            title=escape(f"{source}: {title}"),
            lead="",
            claims=f'<p class="claim">{escape(table.claim)}</p>',
            facts="",
            sections=f"<section>{_measured(table)}</section>",
        )
    file.write_text(text, encoding="utf-8")


def _facts(run: RunSummary) -> dict[str, str]:
    size, classes = run.data["resolution"], run.data["classes"]
    facts = {
        "Recipe": f"{run.train_arguments[1]}, hash {run.recipe.hash:.12}",
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


def _measured(table: ResultTable) -> str:
    chart = _chart_by_nfe(table) if table.curves else ""
    return f'<div class="measured"><div>{_table(table.rows)}{_note(table.caption)}</div>{chart}</div>'


def _swept(tables: Sequence[ResultTable], commands: Mapping[str, str]) -> str:
    if "sweep" not in commands:
        return ""
    body = "".join(f"<p>{escape(table.claim)}</p>{_measured(table)}" for table in tables)
    return body or f"<p>Nothing is measured yet. This measures:</p>{_shell(commands['sweep'])}"


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Args: rows: the first is the head.  kind: a class of the page's style for the cells, after a space."""
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="scroll{kind}"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _chart_by_nfe(table: ResultTable) -> str:
    return svg_curves(f"{table.metric} by NFE", table.curves, powers_of_two(table.curves), log=True)


def _samples(run: RunSummary) -> str:
    """Grids of the run from the first to the last, and what was drawn into a folder of it afterwards."""
    files = _numbered(run.path / "samples")
    steps = "".join(f"<span>{nfe}</span>" for nfe in run.recipe.sampling.nfe)
    figures = [
        (f"after {int(files[i].stem):,} images", f'<div class="steps">{steps}</div>{_picture(files[i])}')
        for i in sorted({(len(files) - 1) * part // (GRIDS - 1) for part in range(GRIDS)})
        if files
    ]
    seen = _numbered(run.path / "x0")[-1:]
    figures += [(f"x0 after {int(file.stem):,} images", _picture(file)) for file in seen]
    figures += [(f"drawn into {file.parent.name}", _picture(file)) for file in sorted(run.path.glob("*/grid.png"))]
    if not figures:
        return "<p>Nothing is drawn yet.</p>"
    body = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{content}</figure>" for name, content in figures)
    note = "Over training always the same seeds; at the left of the rows, the number of network evaluations."
    note += " x0: noisy data, and what each role takes them to be without their noise." if seen else ""
    return f'{_note(note)}<div class="figures">{body}</div>'


def _numbered(folder: Path) -> list[Path]:
    """Returns the pictures that training has drawn, by images seen."""
    return sorted(file for file in folder.glob("*.png") if file.stem.isdecimal())


def _picture(file: Path) -> str:
    try:
        with Image.open(file) as image:
            image.thumbnail((WIDEST, 10 * WIDEST))
            image.save(data := io.BytesIO(), "png", optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # SyntaxError: Pillow's, of a torn file
        return "<p>This picture cannot be read.</p>"
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{text}" width="{image.width}" height="{image.height}" alt="Samples">'


def _training(metrics: Sequence[Mapping[str, float]]) -> str:
    if not metrics:
        return "<p>Nothing is logged yet.</p>"
    total, order = metrics[-1]["images"], list(CURVES)
    charts: dict[str, dict[str, list[Point]]] = {}
    for line in metrics:
        for key in line.keys() - {"images", "step", "seconds", "memory"}:
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
        return svg_curves(
            ", ".join([CURVES.get(kind, kind.replace("_", " ")), *about]), curves, Axis([0, total / 2, total])
        )

    note = "Against images seen."
    if "score_gap" in charts:
        note += (
            " The generator's loss need not fall and says little; the score gap, how far the auxiliary score is from"
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


def _expected(run: RunSummary) -> str:
    if run.config is None:
        return "<p>There is no checkpoint yet, from which the plan takes the network's shape.</p>"
    found = compare_with_plan(run)
    return _table(found.rows, " values") + "".join(map(_note, found.notes))


def _environment(sessions: Sequence[Mapping[str, Any]]) -> str:
    """A column for each environment: a run may go on in another."""
    if not sessions:
        return "<p>This run kept no record of where it was computed.</p>"
    columns = [list(same) for _, same in groupby(sessions, _place)]
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Began": lambda own: own["began"].replace("T", " ").replace("+00:00", " UTC"),
        "Device": lambda own: own["device"],
        "Its memory": lambda own: f"{own['device_memory'] / 2**30:.1f} GiB",
        "Processes": lambda own: str(own["processes"]),
        "Options": _options,
        "edmdistill": lambda own: own["edmdistill"],
        "Revision": lambda own: own["revision"] or "not known",
        "Python": lambda own: own["python"],
        "torch": lambda own: own["torch"] + (f", CUDA {own['cuda']}" if own["cuda"] else ""),
        "System": lambda own: own["system"],
    }
    head = ["", *(f"after {own['images']:,} images" if own["images"] else "from the beginning" for own, *_ in columns)]
    rows = [[name, *(show(own) for own, *_ in columns)] for name, show in shown.items()]
    rows.insert(1, ["Gone on with", *(_again([own["images"] for own in later]) for _, *later in columns)])
    return _table([head, *rows], " values")


def _place(session: Mapping[str, Any]) -> dict[str, Any]:
    """What of a session may be the same of another."""
    return {name: value for name, value in session.items() if name not in ("images", "began")}


def _again(images: Sequence[int]) -> str:
    """How often a run was gone on with.  Args: images: seen before each time."""
    often = "once" if len(images) == 1 else f"{len(images)} times, the last time"
    return f"{often} after {images[-1]:,} images" if images else "never"


def _options(session: Mapping[str, Any]) -> str:
    """How the run uses its machine, as options of `train`."""
    words = [f"--micro-batch {session['micro_batch']}"] if session["micro_batch"] else []
    words += ["--shard"] if session["shard"] else []
    words += [f"--offload {','.join(session['offload'])}"] if session["offload"] else []
    words += ["--checkpoint-activations"] if session["checkpointing"] else []
    return " ".join(words) or "none"


def _recipe(run: RunSummary) -> str:
    """What differs from the defaults, by who says so, and all of it."""
    _, name, *sets = run.train_arguments
    found = origins(run.recipe, run.text, name, sets[1::2])
    rows = [["", "value", "by", "in place of"]]
    for key, own in found.items():
        (who, value), *others = reversed(own.items())
        rows.append([key, _value(value), who, ",\n".join(f"{_value(other)} ({it})" for it, other in others)])
    whole = run.recipe.to_json().decode().strip()
    return (
        f"{_note('What is not the default, and who says so.')}{_table(rows, ' values')}"
        f"<details><summary>The file</summary>{_code(run.text)}</details>"
        f"<details><summary>Every value, with the defaults</summary>{_code(whole)}</details>"
    )


def _value(value: object) -> str:
    """As JSON, but a line for each entry of a table."""
    if isinstance(value, dict) and value:
        return "\n".join(f"{key}: {json.dumps(inner)}" for key, inner in value.items())
    return json.dumps(value)


def _commands(run: RunSummary) -> dict[str, str]:
    """To draw, to measure, also the teacher, and to train again or go on, by what they are for."""
    path, nfe, data, out = str(run.path), run.recipe.sampling.nfe, run.data["name"], run.path / "eval"
    steps = ",".join(map(str, nfe))
    fits = [name for name, protocol in PROTOCOLS.items() if protocol.reference and protocol.reference.source == data]
    measure = ["--protocol", fits[0]] if fits else ["--protocol", "pixels", "--ref", "DATA"]
    given = [] if run.recipe.network else ["TEACHER"]
    given += ["--data", data if fits else "DATA", *run.train_arguments]
    usual = str(2 if 2 in nfe else nfe[0])
    commands = {
        "sample": ["sample", path, "--nfe", usual, "--seeds", "0-63", "--out", str(run.path / "images")],
        "eval": ["eval", path, "--nfe", steps, *measure, "--out", str(out / "generator.json")],
        "sweep": ["sweep", path, "--nfe", steps, "--gamma", "0,.5,1", *measure, "--out", str(out / "sweep.json")],
        "teacher": ["eval", "TEACHER", *measure, "--out", str(out / "teacher.json")],
        "train": ["train", run.recipe.method_name, *given, "--run-dir", path],
    }
    if run.recipe.method_class.product == "teacher":  # which has no gamma
        del commands["sweep"]
    if run.recipe.network:  # made by the run, of nothing
        del commands["teacher"]
    return {name: shlex.join(["edmdistill", *words]) for name, words in commands.items()}


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _code(text: str) -> str:
    return f'<pre class="scroll">{escape(text)}</pre>'


def _shell(*commands: str) -> str:
    """Commands, each in lines of its own."""
    return f'<pre class="shell">{"".join(f"<code>{escape(command)}</code>" for command in commands)}</pre>'
