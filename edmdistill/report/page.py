"""The page: a run and its measurements in one HTML file that loads nothing else.

Pictures are embedded as base64 and curves as SVG; there is no script. What a run lacks is said in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from edmdistill.checkpoints.documents import escape
from edmdistill.errors import counted
from edmdistill.evaluation.tables import ResultTable
from edmdistill.methods import METHODS
from edmdistill.report import html, sections
from edmdistill.report.curves import powers_of_two, save_matplotlib, standalone_svg
from edmdistill.report.summary import RunSummary

PAGE = Path(__file__).parent.parent / "assets" / "report.html"


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
    return Template(PAGE.read_text("utf-8")).substitute(
        title=escape(f"A {method.product} by {run.recipe.method_name}, from {origin}"),
        lead=escape(f"{METHODS[run.recipe.method_name].summary} Trained on {run.data['name']}, {seen}."),
        claims="".join(f'<p class="claim">{escape(table.claim)}</p>' for table in measured if table.claim),
        overview="".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in _overview(run).items()),
        sections="".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in bodies.items() if body),
    )


def draw(table: ResultTable, source: str, file: Path, kind: str) -> None:
    """Draws a table's curves, the first metric by NFE.

    Args:
        source: what was measured, for the title.
        kind: .svg, .html, .png or .pdf; a page shows the table too.
    Raises: EdmDistillError: .png or .pdf, and matplotlib is not installed.
    """
    title = f"{table.metric} by NFE"
    if kind in (".png", ".pdf"):
        save_matplotlib(file, title, table.curves, powers_of_two(table.curves), kind)
        return
    page = PAGE.read_text("utf-8")
    if kind == ".svg":
        style = page.partition("<style>")[2].partition("</style>")[0]
        text = standalone_svg(sections.chart_by_nfe(table), style)
    else:
        text = Template(page).substitute(
            title=escape(f"{source}: {title}"),
            lead="",
            claims=f'<p class="claim">{escape(table.claim)}</p>',
            overview="",
            sections=f"<section>{sections.quality(table)}</section>",
        )
    file.write_text(text, encoding="utf-8")


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
        rows["Time"] = f"{seconds / 60:.1f} minutes, {images / seconds:.3g} images per second"
    return rows
