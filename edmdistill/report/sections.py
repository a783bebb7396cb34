"""The sections of a report: each returns HTML, or a sentence on what the run lacks."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edmdistill.checkpoints.documents import escape
from edmdistill.checkpoints.encoder import vae_words
from edmdistill.errors import counted
from edmdistill.evaluation.compare import Comparison
from edmdistill.evaluation.diagnosis import read_measures, sentences
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable, caption, heading
from edmdistill.evaluation.training_seeds import MEANS, SeedTable
from edmdistill.kernels.backend import VARIABLE
from edmdistill.machine.environment import machine_of
from edmdistill.planning.fit import options
from edmdistill.recipes.library import origins
from edmdistill.report import html
from edmdistill.report.chart import Chart, Curve
from edmdistill.report.comparison import rows_of
from edmdistill.report.curves import Axis, Point, powers_of_two, svg_curves, svg_heat_map
from edmdistill.report.plan_comparison import compare_with_plan
from edmdistill.report.summary import RunSummary
from edmdistill.sampling.png_folder import GRID
from edmdistill.training.metrics import BINS

MAX_GRIDS = 6
"""Number of a run's sample grids that are shown, the first and the last among them."""
ROWS = "the number of network evaluations is to the left of each row"
"""What a note says of grids."""
DIAGNOSED = "jump/", "gap/", "gap_sensitivity/"
"""Keys of metrics.jsonl that `single_jumps` shows."""
CURVES = {
    "loss": "loss",
    "score_gap": "score gap",
    "cos_gap_error": "cosine of gap and error",
    "gain": "weight of the second time",
    "sensitivity": "what t changes in the score gap, as a share",
    "tangent_rms": "size of the tangent, before it is normalized",
    "gan_accuracy": "accuracy of the discriminator",
    "grad_norm": "gradient norm",
    "diversity": "diversity",
    "mean": "mean",
    "deviation": "standard deviation",
    "images_per_second": "images per second",
    "lr": "learning rate",
}
"""Titles of the keys in metrics.jsonl, in the order of the page; other keys come last, under their own names."""


def quality(table: ResultTable) -> str:
    """Returns a table of results, beside its curves."""
    chart = chart_by_nfe(table).to_svg() if table.curves else ""
    return f'<div class="measured"><div>{html.table(table.rows)}{html.note(table.caption)}</div>{chart}</div>'


def sweep(tables: Sequence[ResultTable], commands: Mapping[str, str]) -> str:
    """Returns the tables by gamma; "" for a teacher, which has none."""
    if "sweep" not in commands:
        return ""
    body = "".join(f"<p>{escape(table.claim)}</p>{quality(table)}" for table in tables)
    return body or f"<p>Nothing is measured yet. To measure:</p>{html.shell(commands['sweep'])}"


def comparison(table: Comparison | SeedTable, charts: Sequence[Chart], note: str) -> str:
    """Returns the table of a comparison, with the samplers last as in reports, what was measured, and its charts."""
    head, *body = table.cells()
    at, metrics = head.index("sampler"), len(table.metrics)
    head = [*head[:-metrics], *map(heading, head[-metrics:])]
    rows = [[*row[:at], *row[at + 1 :], row[at]] for row in (["", *head[1:]], *body)]
    protocols = {row.result.protocol_sha256: row.result.protocol for row in rows_of(table)}
    notes = [MEANS] if isinstance(table, SeedTable) else []
    notes += [*table.notes, note, *map(caption, protocols.values())]
    drawn = "".join(chart.to_svg() for chart in charts)
    return f'{html.table(rows)}{"".join(map(html.note, filter(None, notes)))}<div class="charts">{drawn}</div>'


def chart_by_nfe(table: ResultTable) -> Chart:
    curves = [Curve(name, points, style=i) for i, (name, points) in enumerate(table.curves.items())]
    return Chart(f"{table.metric} by NFE", curves, powers_of_two(table.curves.values()))


def samples(run: RunSummary) -> str:
    """Returns grids from training, from the first to the last, and those sampled into folders of the run since."""
    files = training_grids(run)
    shown = [
        grid_figure(run, files[i])
        for i in sorted({(len(files) - 1) * part // (MAX_GRIDS - 1) for part in range(MAX_GRIDS)})
        if files
    ]
    seen = _pictures(run.path / "x0")[-1:]
    shown += [(f"x0 after {counted(int(file.stem), 'image')}", html.picture(file)) for file in seen]
    shown += [
        (f"sampled into {file.name.removesuffix(GRID)}", html.picture(file))
        for file in sorted(run.path.glob(f"*{GRID}"))
    ]
    if not shown:
        return "<p>Nothing is sampled yet.</p>"
    note = f"The seeds are the same throughout training; {ROWS}."
    note += " x0: noisy data, and each role's denoised prediction of them." if seen else ""
    return html.note(note) + figures(shown)


def training_grids(run: RunSummary) -> list[Path]:
    """Returns the sample grids of training, in order of images seen."""
    return _pictures(run.path / "samples")


def grid_figure(run: RunSummary, grid: Path) -> tuple[str, str]:
    """Returns a caption of one of a run's training_grids, and the grid with the numbers of evaluations beside it."""
    steps = "".join(f"<span>{nfe}</span>" for nfe in run.recipe.sampling.nfe)
    return f"after {counted(int(grid.stem), 'image')}", f'<div class="steps">{steps}</div>{html.picture(grid)}'


def figures(figures: Sequence[tuple[str, str]]) -> str:
    """Returns pictures side by side.  figures: the caption of each, and the picture as HTML."""
    body = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{picture}</figure>" for name, picture in figures)
    return f'<div class="figures">{body}</div>'


def _pictures(folder: Path) -> list[Path]:
    """Returns the pictures of training, in order of images seen."""
    return sorted(file for file in folder.glob("*.png") if file.stem.isdecimal())


def single_jumps(metrics: Sequence[Mapping[str, float]]) -> str:
    """Returns the newest diagnosis in metrics.jsonl; "" if there is none."""
    diagnosis = next((diagnosis for line in reversed(metrics) if (diagnosis := read_measures(line)).jumps), None)
    if diagnosis is None:
        return ""
    curves: dict[str, list[Point]] = {"generator": [(jump.sigma, jump.generator) for jump in diagnosis.jumps]}
    if beside := [(jump.sigma, jump.teacher) for jump in diagnosis.jumps if jump.teacher is not None]:
        curves["the teacher's denoiser"] = beside
    charts = [svg_curves("distance of one jump by sigma", curves, _around(curves["generator"]), log=True)]
    if diagnosis.gaps:
        gaps = {(gap.sigma_s, gap.sigma_t): gap for gap in diagnosis.gaps}
        charts += [
            svg_heat_map("score gap by s (across) and t", {pair: gap.gap for pair, gap in gaps.items()}),
            svg_heat_map("what t changes in it, as a share", {pair: gap.sensitivity for pair, gap in gaps.items()}),
        ]
    note = html.note("Jumps from real images with noise, whatever precedes them in several steps. s and t are sigmas.")
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(diagnosis))
    return f'{note}{paragraphs}<div class="figures">{"".join(charts)}</div>'


def _around(points: Sequence[Point]) -> Axis:
    """Returns a logarithmic axis of powers of ten around the points."""
    low, high = (pick(at for at, _ in points) for pick in (min, max))
    return Axis([10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)], log=True)


def training(metrics: Sequence[Mapping[str, float]]) -> str:
    """Returns the curves of metrics.jsonl."""
    if not metrics:
        return "<p>Nothing is logged yet.</p>"
    total, order = metrics[-1]["images"], list(CURVES)
    charts: dict[str, dict[str, list[Point]]] = {}
    for line in metrics:
        for key in line.keys() - {"images", "step", "seconds", "memory"}:
            if math.isfinite(line[key]) and not key.startswith(DIAGNOSED):
                chart, curve = _chart_and_curve(key)
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

    note = "By images seen."
    if "score_gap" in charts:
        note += (
            " The generator's loss need not fall and is little informative; the score gap, the distance between the"
            " auxiliary score and the teacher's, is a better guide."
        )
    return f'{html.note(note)}<div class="figures">{"".join(map(draw, sorted(charts, key=place)))}</div>'


def _chart_and_curve(measure: str) -> tuple[str, str]:
    """Returns the chart that a key belongs to, and its curve there."""
    kind, *about = measure.split("/")
    if kind in ("generated", "data"):
        what, channel = about
        return f"{'mean' if what == 'mean' else 'deviation'}/channel {channel}", kind
    if about and about[-1] in BINS:
        return "/".join([kind, *about[:-1], "sigma"]), about[-1].removeprefix("sigma")
    return measure, ""


def plan(run: RunSummary) -> str:
    """Returns the plan of the run, beside what it measured."""
    if run.config is None:
        return "<p>There is no checkpoint yet, and the plan needs the network's shape.</p>"
    comparison = compare_with_plan(run)
    return html.table(comparison.rows, " values") + "".join(map(html.note, comparison.notes))


def environment(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Returns a column for each environment: a run may be resumed in another."""
    if not sessions:
        return "<p>This run has no record of its environment.</p>"
    columns = [list(same) for _, same in groupby(sessions, _machine)]
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Began": lambda session: session["began"].replace("T", " ").replace("+00:00", " UTC"),
        "Device": lambda session: session["device"],
        "Device memory": lambda session: f"{session['device_memory'] / 2**30:.1f} GiB",
        "Processes": lambda session: str(session["processes"]),
        "Threads": lambda session: str(session.get("threads", "unknown")),
        "Options": _options,
        "edmdistill": lambda session: session["edmdistill"],
        "Revision": lambda session: session["revision"] or "unknown",
        "Python": lambda session: session["python"],
        "torch": lambda session: session["torch"] + (f", CUDA {session['cuda']}" if session["cuda"] else ""),
        "System": lambda session: session["system"],
    }
    head = [
        "",
        *(f"after {session['images']:,} images" if session["images"] else "from the start" for session, *_ in columns),
    ]
    rows = [[name, *(show(session) for session, *_ in columns)] for name, show in shown.items()]
    rows.insert(1, ["Resumed", *(_resumes([session["images"] for session in later]) for _, *later in columns)])
    return html.table([head, *rows], " values")


def _machine(session: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a session that others may share."""
    return {name: value for name, value in session.items() if name not in ("images", "began")}


def _resumes(images: Sequence[int]) -> str:
    """Returns how often a run was resumed.  Args: images: seen before each time."""
    often = "once" if len(images) == 1 else f"{len(images)} times, the last time"
    return f"{often} after {counted(images[-1], 'image')}" if images else "never"


def _options(session: Mapping[str, Any]) -> str:
    """Returns how the run uses its machine, as options of `train`."""
    words = [options(machine_of(session))]
    words += [f"{VARIABLE}={session['kernels']}"] if session.get("kernels", "torch") != "torch" else []
    return " ".join(filter(None, words)) or "none"


def recipe(run: RunSummary) -> str:
    """Returns the values that differ from the defaults, where each is set, and the whole recipe."""
    _, name, *sets = run.train_arguments
    values = origins(run.recipe, run.text, name, sets[1::2])
    rows = [["", "value", "set by", "instead of"]]
    for key, layers in values.items():
        (layer, value), *others = reversed(layers.items())
        rows.append([key, _value(value), layer, ",\n".join(f"{_value(other)} ({name})" for name, other in others)])
    whole = run.recipe.to_json().decode().strip()
    return (
        f"{html.note('Values that differ from the defaults, and where they are set.')}{html.table(rows, ' values')}"
        f"<details><summary>The file</summary>{html.code(run.text)}</details>"
        f"<details><summary>Every value, including defaults</summary>{html.code(whole)}</details>"
    )


def _value(value: object) -> str:
    """Returns a value as JSON, with a line for each entry of a table."""
    if isinstance(value, dict) and value:
        return "\n".join(f"{key}: {json.dumps(inner)}" for key, inner in value.items())
    return json.dumps(value)


def commands(run: RunSummary) -> dict[str, str]:
    """Returns the commands that sample, measure (the teacher too), and repeat or resume the training, by name."""
    path, nfe, data, out = str(run.path), run.recipe.sampling.nfe, run.data["name"], run.path / "eval"
    steps = ",".join(map(str, nfe))
    fits = [name for name, protocol in PROTOCOLS.items() if protocol.reference and protocol.reference.source == data]
    measure = ["--protocol", fits[0]] if fits else ["--protocol", "pixels", "--ref", "DATA"]
    vae = vae_words(run.config.encoder) if run.config else []
    if vae:  # what is measured are the decoded pictures
        measure = ["--protocol", "edm2", "--ref", "IMAGES", *vae]
    given = [] if run.recipe.network else ["TEACHER"]
    given += ["--data", data if fits else "DATA", *run.train_arguments]
    usual = str(2 if 2 in nfe else nfe[0])
    commands = {
        "sample": ["sample", path, "--nfe", usual, "--seeds", "0-63", *vae, "--out", str(run.path / "images")],
        "eval": ["eval", path, "--nfe", steps, *measure, "--out", str(out / "generator.json")],
        "sweep": ["sweep", path, "--nfe", steps, "--gamma", "0,.5,1", *measure, "--out", str(out / "sweep.json")],
        "teacher": ["eval", "TEACHER", *measure, "--out", str(out / "teacher.json")],
        "train": ["train", run.recipe.method_name, *given, "--run-dir", path],
    }
    if run.recipe.method_class.product == "teacher":  # a teacher has no gamma
        del commands["sweep"]
    if run.recipe.network:  # there is no teacher
        del commands["teacher"]
    return {name: shlex.join(["edmdistill", *words]) for name, words in commands.items()}
