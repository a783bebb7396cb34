"""Names in a report stay text: no tag, attribute, script or control character comes from a run, a file or a result."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.documents import _lines, code, code_block, escape, markdown
from edmdistill.errors import printable
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.tables import ResultTable
from edmdistill.recipes.library import load_recipe
from edmdistill.report import page, sections
from edmdistill.report.chart import Chart, Curve
from edmdistill.report.curves import powers_of_two, standalone_svg, svg_curves
from edmdistill.report.plan_comparison import PlanComparison
from edmdistill.report.summary import RunSummary

CONFIG = msgspec.json.decode(
    (Path(__file__).parent.parent / "checkpoints" / "format-1.0" / "config.json").read_bytes(), type=CheckpointConfig
)
RECIPE = load_recipe("cosim/digits-quickstart")
HOSTILE = "</title></pre></svg>\"><img src=x onerror='alert(1)'>$title ${x} {{7*7}} <!-- `x` \x1b[2J \u202e]]> &lt;"
NAMES = st.text(min_size=1, max_size=30) | st.sampled_from(
    [HOSTILE, "\0", "\x85\u2028", "&amp;", "' onclick='x", "a\nb", "\ud800"]
)


class Outline(HTMLParser):
    """Tags with the names of their attributes, whatever stands in the values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def table(name: str) -> ResultTable:
    rows = [["", "NFE", name], [name, "35", "1.5"]]
    return ResultTable(PROTOCOLS["digits"], rows, name, {name: [(1, 9.0), (4, 5.0)]}, name)


def written(name: str, folder: Path) -> str:
    """A report in which everything that is free to choose is `name`."""
    origin = replace(CONFIG.provenance, source=name, licence=name, sha256=name)
    session = dict.fromkeys(("edmdistill", "revision", "python", "torch", "cuda", "system", "device"), name)
    session |= {"images": 0, "began": name, "device_memory": 1, "processes": 1, "micro_batch": 1, "shard": True}
    session |= {"offload": [name], "checkpointing": False}
    run = RunSummary(
        path=folder,
        recipe=RECIPE,
        train_arguments=["--recipe", "cosim/digits-quickstart"],
        data={"name": name, "images": 10, "resolution": 8, "classes": 3},
        config=replace(CONFIG, provenance=origin),
        metrics=[{"images": 10, "seconds": 1.0, name + "/a": 1.0, "loss/" + name: 2.0}] * 2,
        sessions=[session],
    )
    (folder / "recipe.toml").write_text("# " + printable(name) + "\n[method]\nname = 'cosim'\n", "utf-8")
    return page.report(run, [table(name)], [table(name)])


@settings(max_examples=25)
@given(NAMES)
@example(HOSTILE)
def test_a_report_has_the_same_tags_whatever_the_names(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as one, TemporaryDirectory() as other:
        patch.setattr(sections, "compare_with_plan", lambda run: PlanComparison([["", name], [name, name]], [name]))
        patch.setattr(sections, "BINS", ())  # a name may be that of a noise level
        text, plain = written(name, Path(one)), Outline(written("x", Path(other)))
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e]", text)
    outline = Outline(text)
    assert set(outline.tags) == set(plain.tags)
    assert not {tag for tag, *_ in outline.tags} & {"script", "iframe", "object", "link", "form"}
    if len(name) > 3:
        assert re.sub(r"\s", "", _lines(name)) in re.sub(r"\s", "", outline.text)


def test_names_of_files_and_folders(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "<b onclick='x'>-grid.png")
    (tmp_path / "samples").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "samples" / "my own.png")  # not of the training
    (tmp_path / "samples" / "000000064.png").write_bytes(b"\x89PNG torn")
    run = RunSummary(tmp_path, RECIPE, ["--recipe", "x"], {}, None, [], [])
    text = sections.samples(run)
    assert "sampled into &lt;b onclick=&#x27;x&#x27;&gt;" in text
    assert "This picture cannot be read." in text
    assert "my own" not in text


@given(NAMES)
@example(HOSTILE)
def test_a_chart_is_xml_of_its_own_tags(name: str) -> None:
    points = [(1, 2.0), (2, 3.0)]
    x = powers_of_two([points])
    for chart in (svg_curves(name, {name: points}, x), Chart(name, [Curve(name, points)], x).to_svg()):
        root = ElementTree.fromstring(standalone_svg(chart, "").encode())
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {"svg", "style", "rect", "text", "tspan", "path", "g", "polygon", "polyline", "circle"}


@given(NAMES)
@example(HOSTILE)
def test_what_shows_text_shows_it_in_one_line(name: str) -> None:
    for shown in (printable(name), markdown(name), code(name)):
        assert shown.splitlines() in ([shown], [])
        shown.encode()
    assert len(code_block(name).splitlines()) >= 3
    body = "\n".join(code_block(name).splitlines()[1:-1])
    assert code_block(name).splitlines()[0] not in body.splitlines()
    assert not set(escape(name)) & set("<>\"'")
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]]", markdown(name))


def test_usual_names_are_left_as_they_are() -> None:
    for name in (
        "edm2-img512-s-2147483-0.025.pkl",
        "https://host/a_b/edm.pkl",
        "me/digits@v1",
        "tree frog, café",
        "日本",
    ):
        assert markdown(name) == printable(name) == name
