"""What runs side by side measured and drew while they trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edmdistill.checkpoints.layout import RECIPE
from edmdistill.evaluation.compare import Comparison
from edmdistill.evaluation.metrics import loss_of
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import heading
from edmdistill.evaluation.training_seeds import SeedTable
from edmdistill.recipes.schema import EvaluationTable
from edmdistill.report import html, sections
from edmdistill.report.chart import Chart, Curve
from edmdistill.report.comparison import Line, distinct_names, rows_of, short_names
from edmdistill.report.curves import Point, axis
from edmdistill.report.summary import RunSummary, read_run
from edmdistill.training.metrics import metric_and_nfe


class ComparedRun(NamedTuple):
    """A run of a comparison.  style: of its first line there."""

    name: str
    run: RunSummary
    style: int


def runs_of(table: Comparison | SeedTable, lines: Sequence[Line]) -> list[ComparedRun]:
    """Returns the run directories of a comparison.  Raises: EdmDistillError: one is damaged."""
    folders = dict.fromkeys(row.folder for row in rows_of(table) if row.folder is not None)
    runs = [folder for folder in folders if (folder / RECIPE).is_file()]
    names = short_names(map(str, runs))
    styles = {folder: style for style, line in reversed([*enumerate(lines)]) for folder in line.folders}
    return [
        ComparedRun(names[str(folder)], read_run(folder), styles.get(folder, len(lines) + i))
        for i, folder in enumerate(runs)
    ]


def quality_while_training(runs: Sequence[ComparedRun]) -> str:
    """Returns charts of what [evaluation] measured, by images seen and by device time; "" if nothing was measured.

    What was not measured alike is in charts of its own.
    """
    measured: dict[tuple[str, tuple[str, ...]], list[ComparedRun]] = {}
    for each in runs:
        for key in dict.fromkeys(key for line in each.run.metrics for key in line if metric_and_nfe(key)):
            measured.setdefault((key, _conditions(each.run)), []).append(each)
    if not measured:
        return ""
    conditions = list(dict.fromkeys(conditions for _, conditions in measured))
    words = dict(zip(conditions, distinct_names(conditions), strict=True)) if len(conditions) > 1 else {}
    by_images, by_time = [], []
    for (key, condition), those in measured.items():
        title = ", ".join(filter(None, [_title(key), words.get(condition, "")]))
        by_images += _chart(f"{title}, by images seen", key, those, images_seen)
        by_time += _chart(f"{title}, by device hours", key, those, device_hours)
    note = "Measured while training, of the averages, as [evaluation] of each recipe says."
    if by_time:
        note += f" A device hour is an hour of training on one device: {_devices(runs)}."
    charts = "".join(chart.to_svg() for chart in [*by_images, *by_time])
    return f'{html.note(note)}<div class="charts">{charts}</div>'


def newest_samples(runs: Sequence[ComparedRun]) -> str:
    """Returns the newest grid of each run that has one; "" if none has."""
    grids = []
    for name, run, _ in runs:
        for grid in sections.training_grids(run)[-1:]:
            caption, picture = sections.grid_figure(run, grid)
            grids.append((f"{name}, {caption}", picture))
    return html.note(f"The newest grid of each run; {sections.ROWS}.") + sections.figures(grids) if grids else ""


def device_hours(run: RunSummary) -> list[float]:
    """Returns the hours of training until each line of the metrics, times the processes; empty if these are unknown.

    A run has a process for each GPU, or one on a CPU.
    """
    if not run.sessions:
        return []
    hours, total, before, images = [], 0.0, 0.0, 0.0
    for line in run.metrics:
        processes = [session["processes"] for session in run.sessions if session["images"] <= images]
        total += (line["seconds"] - before) / 3600 * (processes or [run.sessions[0]["processes"]])[-1]
        hours.append(total)
        before, images = line["seconds"], line["images"]
    return hours


def images_seen(run: RunSummary) -> list[float]:
    """Returns the images seen at each line of the metrics."""
    return [line["images"] for line in run.metrics]


def _chart(
    title: str, key: str, runs: Sequence[ComparedRun], progress: Callable[[RunSummary], Sequence[float]]
) -> list[Chart]:
    """Returns the chart of a measure by the progress at each line of the metrics; none without a point."""
    curves = []
    for name, run, style in runs:
        lines = zip(progress(run), run.metrics, strict=False)
        points: list[Point] = [(at, line[key]) for at, line in lines if key in line and math.isfinite(line[key])]
        curves += [Curve(name, points, style=style)] if points else []
    last = max((at for curve in curves for at, _ in curve.points), default=0.0)
    metric, _ = metric_and_nfe(key) or (key, 0)
    return [Chart(title, curves, axis([0.0, last]), log=loss_of(metric, 1) > 0)] if curves else []


def _title(key: str) -> str:
    metric, nfe = metric_and_nfe(key) or (key, 0)
    return f"{heading(metric)} in {nfe} NFE"


def _conditions(run: RunSummary) -> tuple[str, ...]:
    """Returns what [evaluation] decides of a number, beside what the metric's name says, in words."""
    table = run.recipe.evaluation
    if not isinstance(table, EvaluationTable):  # it was taken out since
        return "", "", "", ""
    standard = PROTOCOLS.get(table.protocol)
    reference = table.ref or ("" if standard is not None and standard.reference else run.data["name"])
    files = " ".join(f"{name}={file}" for name, file in sorted(table.weights.items()))
    return (
        f"protocol {table.protocol}",
        f"{table.n} images",
        f"against {reference}" if reference else "",
        f"weights {files}" if files else "",
    )


def _devices(runs: Sequence[ComparedRun]) -> str:
    """Returns the devices, and of which runs, if they differ."""
    names: dict[str, list[str]] = {}
    for each in runs:
        for device in dict.fromkeys(session["device"] for session in each.run.sessions):
            names.setdefault(device, []).append(each.name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{device} ({', '.join(those)})" for device, those in names.items())
