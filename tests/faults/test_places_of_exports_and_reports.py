"""Where exports and reports are written: a place that will not do is one sentence, and nothing is left half-written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from run_folders import untrained_run

from edmdistill.checkpoints.load import load_flow
from edmdistill.cli import main
from edmdistill.errors import EdmDistillError
from edmdistill.export import folder as exports
from edmdistill.export.parity import compare

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path / "run")


def export(out: object, *words: str, to: str = "nvidia") -> Result:
    return CliRunner().invoke(main, ["export", str(GENERATOR), "--to", to, "--out", str(out), *words])


def report(run: Path, out: object) -> Result:
    return CliRunner().invoke(main, ["report", str(run), "--out", str(out)])


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


@contextmanager
def small_disk() -> Iterator[None]:
    """No file grows beyond 2 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


HOSTILE = [
    ("", "the path is empty"),
    ("/", "is the root folder"),
    ("a\0b", "control character"),
    ("~no-such-user/x", "names a user who does not exist"),
    ("a" * 300, "longer than"),
    ("{here}/file.txt/x", "cannot be written"),
]


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        *HOSTILE,
        ("{here}/file.txt", "exists and is not an export"),
        ("{here}/model.onnx", "looks like a file, but an export is a folder"),
        ("{here}/G.PT2", "looks like a file, but an export is a folder"),
        ("/dev/null", "is a device or a pipe"),
    ],
)
def test_a_place_that_takes_no_export(out: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    refused(export(out.format(here=tmp_path)), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        *((f"{out}.html" if out.startswith(("a", "~")) else out, sentence) for out, sentence in HOSTILE[:5]),
        ("{here}/file.txt/x.html", "cannot be written"),
        ("{here}/x.pdf", "must end in .html or .htm"),
        ("{here}/x", "must end in .html or .htm"),
        ("{here}/folder.html", "is a folder, and a file is to be written"),
        ("/dev/full", "must end in .html or .htm"),
    ],
)
def test_a_place_that_takes_no_report(run: Path, out: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    refused(report(run, out.format(here=tmp_path)), sentence)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.html", "run"]


def test_suffixes_are_read_without_case(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path / "X.HTML").exit_code == 0
    assert (tmp_path / "X.HTML").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("to", ["nvidia", "torch-export", "space"])
def test_a_full_disk_names_the_place_and_leaves_it(to: str, tmp_path: Path) -> None:
    with small_disk():
        result = export(tmp_path / "out", to=to)
    refused(result, f"Error: {tmp_path}/out")
    assert ".new" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_report_that_is_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("before")
    with small_disk():
        refused(report(run, tmp_path / "x.html"), f"{tmp_path}/x.html cannot be written: ")
    assert (tmp_path / "x.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.html"]


def test_symbolic_links_are_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "out").mkdir()
    for link, target in (("out", "there/out"), ("x.html", "there/y.html")):
        (tmp_path / link).symlink_to(target)
    assert export(tmp_path / "out").exit_code == report(run, tmp_path / "x.html").exit_code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "x.html").is_symlink()
    assert (tmp_path / "there" / "out" / "export.json").is_file()
    assert (tmp_path / "there" / "y.html").is_file()


def test_ctrl_c_is_a_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, *arguments: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setitem(exports.TARGETS, "nvidia", exports.TARGETS["nvidia"]._replace(write=interrupted))
    result = export(tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_images_are_not_finite_is_not_exported() -> None:
    flow, config = load_flow(GENERATOR)
    with torch.no_grad():
        next(flow.network.parameters()).mul_(float("nan"))
        with pytest.raises(EdmDistillError, match=r"^3 of 3 images are not finite"):
            compare(flow, config, lambda nfe: torch.zeros(3, 1, 4, 4))
