"""`edmdistill report`: where it reads, where it writes, and what it says."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from run_folders import untrained_run

from edmdistill.cli import main
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import Result as Measurement
from edmdistill.evaluation.results import results_json
from edmdistill.report.summary import read_run
from edmdistill.sampling.spec import SamplerRecord


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path / "run")


def measurement(fd: float, nfe: int = 35, gamma: float | None = None, **origin: object) -> str:
    protocol = PROTOCOLS["digits"]
    result = Measurement(
        metrics={"fd_digits": fd},
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="heun" if gamma is None else "gamma", nfe=nfe, gamma=gamma),
        provenance=origin,
    )
    return results_json([result])


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_a_damaged_recipe_is_a_sentence(run: Path):
    (run / "recipe.toml").write_text("a = [")
    result = report(run)
    assert result.exit_code == 2
    assert "is a damaged run directory" in result.stderr.splitlines()[-1]


def test_all_results_of_the_run_by_default(run: Path):
    (run / "eval").mkdir()
    for name, fd, nfe in (("a", 4.25, 35), ("b", 5.75, 17)):
        (run / "eval" / f"{name}.json").write_text(measurement(fd, nfe))
    result = report(run)
    assert result.exit_code == 0, result.output
    page = (run / "report.html").read_text()
    for value in ("4.250", "5.750"):
        assert value in page
        assert value in result.stdout
    assert result.stdout.splitlines()[-1] == f"{run / 'report.html'} is written."


def test_several_gammas_are_listed_and_then_laid_out_by_steps(run: Path):
    (run / "eval").mkdir()
    made = {"method": "cosim", "recipe_hash": read_run(run).recipe.hash, "images_seen": 0}
    for name, fd, gamma in (("a", 8.25, 0.0), ("b", 6.5, 0.5), ("c", 9.75, 1.0)):
        (run / "eval" / f"{name}.json").write_text(measurement(fd, 2, gamma, **made))
    (run / "eval" / "d.json").write_text(measurement(4.5))
    shown = report(run).stdout
    listed, by_steps = shown.split("Protocol ")[1:]
    assert all(value in listed for value in ("8.250", "6.500", "9.750", "4.500"))
    assert all(value in by_steps for value in ("8.250", "6.500", "9.750"))
    page = (run / "report.html").read_text("utf-8")
    assert all(page.count(value) for value in ("8.250", "6.500", "9.750", "4.500"))


def test_a_page_may_hold_any_text(run: Path):
    with (run / "recipe.toml").open("a", encoding="utf-8") as file:
        file.write("# für später\n")
    assert report(run).exit_code == 0
    assert "für später" in (run / "report.html").read_text("utf-8")


def test_named_results_and_another_place(run: Path, tmp_path: Path):
    (run / "eval").mkdir()
    (run / "eval" / "a.json").write_text(measurement(4.25))
    (tmp_path / "b.json").write_text(measurement(5.75))
    result = report(run, "--results", tmp_path / "b.json", "--out", tmp_path / "to" / "page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "to" / "page.html").read_text()
    assert "5.750" in page
    assert "4.250" not in page
    assert not (run / "report.html").exists()


def test_a_run_without_results(run: Path):
    result = report(run)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run / 'report.html'} is written.\n"
    assert "Nothing is measured yet." in (run / "report.html").read_text()


def test_no_run_is_the_users_error(tmp_path: Path):
    result = report(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {tmp_path} is not a run directory, because it has no recipe.resolved.json: use the --run-dir of "
        "edmdistill train\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_results_is_the_users_error_and_leaves_the_old_page(run: Path):
    (run / "eval").mkdir()
    (run / "eval" / "a.json").write_text("{")
    (run / "report.html").write_text("old")
    result = report(run)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "a.json holds no results" in result.stderr
    assert (run / "report.html").read_text() == "old"
