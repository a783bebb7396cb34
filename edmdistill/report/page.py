"""Pages: a run and its measurements, or several side by side, in one HTML file that loads nothing else.

Pictures are embedded as base64 and curves as SVG; there is no script. What a run lacks is said in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from edmdistill.checkpoints.documents import escape
from edmdistill.errors import counted, duration
from edmdistill.evaluation.compare import Comparison
from edmdistill.evaluation.tables import ResultTable
from edmdistill.evaluation.training_seeds import SeedTable
from edmdistill.methods import METHODS
from edmdistill.report import html, sections
from edmdistill.report.chart import COLORS, Chart, save_matplotlib
from edmdistill.report.compared_runs import newest_samples, quality_while_training, runs_of
from edmdistill.report.comparison import charts_by_nfe, lines_of, rows_of, short_names, undrawn
from edmdistill.report.curves import standalone_svg
from edmdistill.report.summary import RunSummary

PAGE = Path(__file__).parent.parent / "assets" / "report.html"
MOST_NAMED = 4
"""Sources whose names are in the title of their comparison."""


def report(run: RunSummary, measured: Sequence[ResultTable], swept: Sequence[ResultTable] = ()) -> str:
    """Returns the page.

    Args:
        measured, swept: result_tables and sweep_tables of the run's results.
    """
    method, total = run.recipe.method_class, run.recipe.training.images
    from_data = method.product == "teacher" or run.recipe.network
    origin = run.config.provenance.source if run.config and not from_data else run.data["name"]
    images = int(run.metrics[-1]["images"]) if run.metrics else run.images
    seen = f"{counted(images, 'image')} seen" + ("" if images >= total else f" of {total:,}: the run is unfinished")
    commands = sections.commands(run)
    bodies = {
        "Quality by number of evaluations": "".join(map(sections.quality, measured))
        or f"<p>Nothing is measured yet. To measure:</p>{html.shell(commands['eval'])}",
        "Quality by number of evaluations and gamma": sections.sweep(swept, commands),
        "Samples": sections.samples(run),
        "Single jumps": sections.single_jumps(run.metrics),
        "Training": sections.training(run.metrics),
        "Plan and run": sections.plan(run),
        "Environment": sections.environment(run.sessions),
        "Recipe": sections.recipe(run),
        "Commands": f"<p>Sample, measure, and repeat or resume the training:</p>{html.shell(*commands.values())}",
    }
    return _page(
        f"A {method.product} by {run.recipe.method_name}, from {origin}",
        bodies,
        f"{METHODS[run.recipe.method_name].summary} Trained on {run.data['name']}, {seen}.",
        [table.claim for table in measured],
        _overview(run),
    )


def draw(table: ResultTable, source: str, file: Path, kind: str) -> None:
    """Draws a table's curves, the first metric by NFE.

    Args:
        source: what was measured, for the title.
        kind: .svg, .html, .png or .pdf; a page shows the table too.
    Raises: EdmDistillError: .png or .pdf, and matplotlib is not installed.
    """
    chart = sections.chart_by_nfe(table)
    if kind == ".html":
        page = _page(f"{source}: {chart.title}", {"": sections.quality(table)}, claims=[table.claim])
        file.write_text(page, encoding="utf-8")
    else:
        save_chart(chart, file, kind)


def draw_comparison(table: Comparison | SeedTable, file: Path, kind: str) -> str:
    """Draws a comparison, the first metric by NFE.

    Args:
        kind: .svg, .html, .png or .pdf; a page has the table, all metrics, and what runs measured and drew while they
            trained.
    Returns: a sentence on the rows that are not drawn; "" if all are.
    Raises: EdmDistillError: .png or .pdf, and matplotlib is not installed; no row has a number of evaluations; a run
        is damaged, and a page was to show it.
    """
    lines = lines_of(table)
    charts = charts_by_nfe(table, lines)
    note = undrawn(table)
    if kind != ".html":
        save_chart(charts[0], file, kind)
        return note
    runs = runs_of(table, lines)
    bodies = {
        "Quality by number of evaluations": sections.comparison(table, charts, note),
        "Quality while training": quality_while_training(runs),
        "Samples": newest_samples(runs),
    }
    names = list(short_names(row.source for row in rows_of(table)).values())
    title = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} sources"
    file.write_text(_page(f"Comparison of {title}", bodies), encoding="utf-8")
    return note


def save_chart(chart: Chart, file: Path, kind: str) -> None:
    """Writes a chart as a file of its own.

    Args:
        kind: .svg, .png or .pdf.
    Raises: EdmDistillError: .png or .pdf, and matplotlib is not installed.
    """
    style = PAGE.read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    if kind == ".svg":
        file.write_text(standalone_svg(chart.to_svg(), style), encoding="utf-8")
    else:
        colors = re.findall(r"--(?:first|second|third|fourth|fifth|sixth): (#[0-9a-f]{6})", style)
        save_matplotlib(chart, file, kind, colors[:COLORS])


def _page(
    title: str, bodies: Mapping[str, str], lead: str = "", claims: Sequence[str] = (), overview: Mapping[str, str] = {}
) -> str:
    """Returns a page of these sections, by their headings."""
    headings = {name: f"<h2>{name}</h2>" if name else "" for name in bodies}
    return Template(PAGE.read_text("utf-8")).substitute(
        title=escape(title),
        lead=escape(lead),
        claims="".join(f'<p class="claim">{escape(claim)}</p>' for claim in claims if claim),
        overview="".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in overview.items()),
        sections="".join(f"<section>{headings[name]}{body}</section>" for name, body in bodies.items() if body),
    )


def _overview(run: RunSummary) -> dict[str, str]:
    size, classes = run.data["resolution"], run.data["classes"]
    rows = {
        "Recipe": f"{run.train_arguments[1]}, seed {run.recipe.training.seed}, hash {run.recipe.hash:.12}",
        "Data": f"{run.data['name']}: {run.data['images']:,} images, {size}x{size}, {classes or 'no'} classes",
    }
    if run.config:
        origin = run.config.provenance
        rows |= {
            "Source": origin.source + (f", sha256 {origin.sha256:.12}" if origin.sha256 else ""),
            **({"Guide": f"a network with sha256 {origin.guide:.12}"} if origin.guide else {}),
            **({"Initialized from": f"a generator with sha256 {origin.init:.12}"} if origin.init else {}),
            "Licence": origin.licence or "unknown",
            "Network": f"{run.config.network.kind}, preconditioned as {run.config.preconditioning['kind']}",
        }
    if run.metrics:
        images, seconds = run.metrics[-1]["images"], run.metrics[-1]["seconds"]
        rows["Time"] = f"{duration(seconds)}, {images / seconds:.3g} images per second"
    return rows
