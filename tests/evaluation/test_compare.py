"""Results side by side: what was measured alike in one table, and a sentence on what was not."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from edmdistill.cli import main
from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.compare import Row, compare, differences
from edmdistill.evaluation.protocol import PROTOCOLS, Likelihood, Reference
from edmdistill.evaluation.results import Result, results_json
from edmdistill.sampling.spec import SamplerRecord

SPACES = {"inception": "1a" * 32, "dinov2": "2b" * 32}
EDM2 = replace(PROTOCOLS["edm2"], weights=SPACES, reference=Reference(source="in512.zip", n=9, sha256="ef" * 32))
VALUES = {"fid": 2.5, "fd_dinov2": 68.0}


def result(values: dict[str, float] = VALUES, nfe: int = 2, source: str = "a", **changes: Any) -> Result:
    protocol = replace(EDM2, metrics=tuple(values), **changes)
    return Result(
        metrics=values,
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="gamma", nfe=nfe, gamma=1.0),
        provenance={"source": source},
    )


def test_one_table_of_what_was_measured_alike() -> None:
    other = replace(result({"fid": 2.25}, source="b|c"), sampler=SamplerRecord(solver="heun", nfe=63, guidance=1.4))
    table = compare([Row("a", result()), Row("b|c", other)])
    assert table.to_markdown().splitlines() == [
        "| source | NFE | sampler | fid | fd_dinov2 |",
        "|---|---|---|---:|---:|",
        "| a | 2 | gamma 1 | 2.500 | 68.00 |",
        r"| b\|c | 63 | heun, guidance 1.4 | 2.250 | - |",
    ]
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[2] == ["b|c", "63", "heun, guidance 1.4", "2.25", ""]
    document = json.loads(table.to_json())
    assert document["schema_version"] == 1
    assert [row["result"]["metrics"] for row in document["rows"]] == [VALUES, {"fid": 2.25}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "50000-99999"}, r"they differ in seeds \(0-49999 and 50000-99999\)"),
        ({"n": 10_000}, r"n \(50000 and 10000\)"),
        ({"labels": "balanced"}, r"classes \(drawn and balanced\)"),
        (
            {"reference": Reference(source="edm.npz", sha256="00" * 32)},
            r"reference \(in512\.zip (ef){4} and edm\.npz 0{8}\)",
        ),
        ({"reference": Reference(source="edm.npz")}, r"reference \(in512\.zip (ef){4} and edm\.npz\)"),
        ({"weights": SPACES | {"inception": "00"}}, r"weights of inception \((1a){4} and 00\)"),
        ({"repeat": 3}, r"repetitions \(1 and 3\)"),
        ({"uint8": "round"}, r"rounding \(clip\(127\.5 x \+ 128, 0, 255\), cut and round\)"),
    ],
)
def test_what_was_not_measured_alike_is_refused(changes: dict[str, Any], message: str) -> None:
    rows = [Row("a", result()), Row("b", result(source="b", **changes))]
    with pytest.raises(EdmDistillError, match=rf"fid of a and fid of b cannot stand side by side: .*{message}") as said:
        compare(rows)
    assert "\n" not in str(said.value)


def test_latents_are_compared_where_one_vae_decoded_them() -> None:
    rows = [Row(name, result(decoder=name * 64)) for name in "ab"]
    with pytest.raises(EdmDistillError, match=r"they differ in decoder \(a{8} and b{8}\)"):
        compare(rows)


def test_likelihoods_are_compared_where_they_are_computed_alike() -> None:
    """They have no seeds, and nobody asks for them."""
    fine = Likelihood(probes=4, tolerance=1e-5, sigma_min=0.002, sigma_max=80.0)
    ours, theirs, coarse = (
        result({"nll": 3.0}, features=None, weights={}, seeds=None, likelihood=how)
        for how in (fine, fine, replace(fine, tolerance=1e-3))
    )
    assert compare([Row("a", ours), Row("b", theirs)]).notes == []
    with pytest.raises(EdmDistillError, match="they differ in likelihood"):
        compare([Row("a", ours), Row("b", coarse)])


def test_other_weights_of_another_metrics_space_do_not_matter() -> None:
    other = result({"fid": 1.0}, weights=SPACES | {"dinov2": "00"})
    assert compare([Row("a", result()), Row("b", other)]).metrics == ["fid", "fd_dinov2"]
    assert differences(EDM2, other.protocol, "fid") == []
    assert differences(EDM2, other.protocol, "fd_dinov2") == [f"weights of dinov2 ({'2b' * 4} and 00)"]


def test_precision_depends_on_the_real_images_that_were_kept() -> None:
    kept = replace(EDM2.reference, kept=5)
    rows = [
        Row(name, result({"fid": 2.5, "precision_inception": 0.7}, reference=reference))
        for name, reference in (("a", EDM2.reference), ("b", kept))
    ]
    with pytest.raises(EdmDistillError, match=r"precision_inception of a .* real images \(9 and 5\)"):
        compare(rows)
    unknown = replace(EDM2, reference=None)
    assert differences(EDM2, unknown, "precision_inception") == differences(unknown, EDM2, "precision_inception") == []


def test_metrics_of_other_names_are_other_columns() -> None:
    few, other = result({"fid@5000": 9.0}, n=5000, seeds="0-4999"), result({"fid[00000000]": 8.0}, weights={})
    table = compare([Row("a", result({"fid": 2.5})), Row("b", few), Row("c", other)])
    assert [row[3:] for row in table.cells()[1:]] == [["2.500", "-", "-"], ["-", "9.000", "-"], ["-", "-", "8.000"]]


def test_what_is_not_known_is_noted() -> None:
    theirs = replace(result({"fid": 3.0}, seeds=None, labels="unknown"), sampler=None)
    table = compare([Row("a", result({"fid": 2.5})), Row("them", theirs), Row("them", theirs)])
    assert table.notes == ["Of them, the seeds and classes of fid are unknown."]
    assert table.to_markdown().endswith("|\n\nOf them, the seeds and classes of fid are unknown.")
    assert compare([Row("them", theirs)]).notes == []  # of a number beside no other


def test_other_roundings_are_said() -> None:
    one = result()
    ours, compiled = (
        replace(one, provenance=one.provenance | more)
        for more in ({"device": "cpu"}, {"device": "cuda", "compiled": True})
    )
    note = "a and b differ in device (cpu and cuda), compilation, so they are rounded"
    assert compare([Row("a", ours), Row("b", compiled)]).notes == [f"{note} differently."]
    assert compare([Row("a", ours), Row("b", ours), Row("c", one)]).notes == []  # an earlier version does not say
    plain = replace(ours, provenance=ours.provenance | {"compiled": False})
    assert compare([Row("a", ours), Row("b", plain)]).notes == []


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for file, one in zip(files, (result(), result(nfe=4), result(seeds="1-50000")), strict=True):
        file.write_text(results_json([one]))
    out = tmp_path / "table.csv"
    shown = run(*files[:2], "--out", out)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[3] == "| a | 4 | gamma 1 | 2.500 | 68.00 |"
    assert out.read_text().splitlines()[2] == "a,4,gamma 1,2.5,68.0"
    assert json.loads(run(files[0], "--json").stdout)["metrics"] == ["fid", "fd_dinov2"]
    assert run(files[0], "--csv").stdout.splitlines() == ["source,NFE,sampler,fid,fd_dinov2", "a,2,gamma 1,2.5,68.0"]
    capital = tmp_path / "table.MD"
    assert run(files[0], "--csv", "--out", capital).exit_code == 0
    assert capital.read_text().endswith("\n| a | 2 | gamma 1 | 2.500 | 68.00 |\n")
    both = run(files[0], "--csv", "--json")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--csv and --json exclude each other" in both.stderr
    seen = replace(result(), provenance={"source": "run", "images_seen": 1000})
    (tmp_path / "seen.json").write_text(results_json([seen]))
    assert "| run, 1,000 images seen | 2 |" in run(tmp_path / "seen.json").stdout
    refused = run(*files)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "they differ in seeds (0-49999 and 1-50000)" in refused.stderr


def test_a_run_has_the_name_that_it_has_now(tmp_path: Path) -> None:
    for name in ("moved", "copied"):
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        (folder / "a.json").write_text(results_json([result(source="runs/a")]))
    table = run(tmp_path / "moved", tmp_path / "copied").stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {tmp_path / name}" for name in ("moved", "copied")]


def test_a_run_that_was_measured_in_two_ways_is_compared_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "eval"
    folder.mkdir(parents=True)
    for name, rounding in (("one", "cut"), ("other", "nearest")):
        (folder / f"{name}.json").write_text(results_json([result(uint8=rounding)]))
    refused = run(tmp_path / "a")
    assert refused.exit_code == 2
    assert f"both are of {tmp_path / 'a'}: give {folder / 'one.json'} or {folder / 'other.json'} in" in refused.stderr
    for name in ("one", "other"):
        assert run(folder / f"{name}.json", folder / f"{name}.json").exit_code == 0


def test_a_source_without_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "run holds no results: measure it with `edmdistill eval" in run(tmp_path / "run").stderr
    assert "absent.json holds no results" in run(tmp_path / "absent.json").stderr


@pytest.fixture
def two_sources(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(results_json([result(nfe=1), result(nfe=2)]))
    files[1].write_text(results_json([result({"fid": 2.0}, source="<b>")]))
    return files


@pytest.mark.parametrize("kind", ["svg", "html", "png", "pdf", "SVG"])
def test_a_plot_has_a_curve_for_each_source(two_sources: list[Path], tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"plot.{kind}"
    shown = run(*two_sources, "--plot", file)
    assert (shown.exit_code, shown.stderr) == (0, ""), shown.output
    assert shown.stdout == run(*two_sources).stdout
    if kind in ("png", "pdf"):
        assert file.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[kind])
        return
    text = file.read_text()
    assert text.count("<polyline") == (2 + 1 if kind == "html" else 2), "of FID, and of FD-DINOv2, which b has not"
    assert re.findall('class="label".*?>(.*?)</text>', text)[:2] == ["a", "&lt;b&gt;"]
    assert ("<table" in text) == (kind == "html")


def test_a_plot_of_seeds_has_error_bars(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        folders.append(tmp_path / f"a-{seed}")
        (folders[-1] / "eval").mkdir(parents=True)
        (folders[-1] / "eval" / "a.json").write_text(results_json([result({"fid": 1.0 + seed})]))
        recipe = {"method": {"name": "ect"}, "training": {"seed": seed}}
        (folders[-1] / "recipe.resolved.json").write_text(json.dumps(recipe))
        (folders[-1] / "run.json").write_text("{}")
    for words, bars, curves in (((), 0, 3), (("--over-seeds",), 1, 1)):
        assert run(*folders, *words, "--plot", tmp_path / "a.svg").exit_code == 0
        text = (tmp_path / "a.svg").read_text()
        assert (text.count('class="bar"'), text.count("<polyline")) == (bars, curves)
    assert ">a-{0,1,2}</text>" in text
    page = run(*folders, "--over-seeds", "--plot", tmp_path / "a.html")
    assert (page.exit_code, f"{folders[0]}: the resolved recipe: [training] lacks" in page.stderr) == (2, True)
    assert not (tmp_path / "a.html").exists()


def test_what_cannot_be_drawn_is_said(two_sources: list[Path], tmp_path: Path) -> None:
    images, file = tmp_path / "images.json", tmp_path / "plot.svg"
    images.write_text(results_json([replace(result(source="images"), sampler=None)]))
    some = run(*two_sources, images, "--plot", file)
    assert (some.exit_code, some.stderr) == (0, "Not drawn, as the number of evaluations is not known: images.\n")
    file.unlink()
    none = run(images, "--plot", file)
    assert (none.exit_code, none.stdout) == (2, "")
    assert "leave --plot out" in none.stderr
    refused = run(*two_sources, "--plot", tmp_path / "plot.jpg")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "must end in .svg or .html or .png or .pdf" in refused.stderr
    two_sources[1].write_text(results_json([result(seeds="1-50000")]))
    unlike = run(*two_sources, "--plot", file)
    assert (unlike.exit_code, "cannot stand side by side" in unlike.stderr) == (2, True)
    assert not file.exists()
