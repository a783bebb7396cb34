"""Runs that differ in their training seed alone, as one row."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from tiny_generator import tiny_generator

from edmdistill.checkpoints.load import load_model
from edmdistill.cli import main
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.protocol import PROTOCOLS, Reference
from edmdistill.evaluation.results import Result, is_of_teacher, results_json
from edmdistill.sampling.spec import SamplerRecord

PROTOCOL = replace(PROTOCOLS["pixels"], n=9, seeds="0-8", reference=Reference(source="a.zip", n=9, sha256="ef" * 32))


def result(value: float, nfe: int = 2, seeds: str = "0-8", images: int = 640) -> Result:
    return Result(
        metrics={"fd_pixels": value},
        protocol=replace(PROTOCOL, seeds=seeds),
        protocol_sha256=f"of {seeds}",
        sampler=SamplerRecord(solver="gamma", nfe=nfe, gamma=1.0),
        provenance={"source": "a", "method": "ect", "images_seen": images},
    )


def run(folder: Path, *results: Result, seed: int = 0, lr: float = 0.1, teacher: str = "t", **tables: Any) -> Path:
    (folder / "eval").mkdir(parents=True)
    recipe = {"method": {"name": "ect"}, "training": {"seed": seed, "lr": lr}} | tables
    (folder / "recipe.resolved.json").write_text(json.dumps(recipe))
    (folder / "run.json").write_text(json.dumps({"teacher_sha256": teacher}))
    (folder / "eval" / "a.json").write_text(results_json(results))
    return folder


def compared(*words: object) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_runs_of_several_seeds_are_mean_and_deviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, value in ((0, 10.0), (1, 20.0), (2, 30.0)):
        run(Path(f"runs/a-{seed}"), result(value), result(value / 1000, nfe=4), seed=seed)
    run(Path("runs/b"), result(5.0), lr=0.2)
    runs = "runs/a-0", "runs/a-1", "runs/a-2", "runs/b"
    shown = compared(*runs, "--over-seeds")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines() == [
        "| source | runs | NFE | sampler | fd_pixels |",
        "|---|---|---|---|---:|",
        "| runs/a-{0,1,2}, 640 images seen | 3 | 2 | gamma 1 | 20.00 ± 10.00 |",
        "| runs/a-{0,1,2}, 640 images seen | 3 | 4 | gamma 1 | 0.02000 ± 0.01000 |",
        "| runs/b, 640 images seen | 1 | 2 | gamma 1 | 5.000 |",
        "",
        "Mean ± standard deviation over runs that differ in training.seed alone.",
    ]
    table = list(csv.DictReader(io.StringIO(compared(*runs, "--over-seeds", "--csv").stdout)))
    assert [row["fd_pixels deviation"] for row in table] == ["10.0", "0.01", ""]
    document = json.loads(compared(*runs, "--over-seeds", "--json").stdout)
    assert (document["schema_version"], document["rows"][0]["seeds"]) == (1, [0, 1, 2])
    assert math.isclose(document["rows"][1]["mean"]["fd_pixels"], 0.02)
    assert [one["name"] for one in document["rows"][0]["runs"]] == [f"{name}, 640 images seen" for name in runs[:3]]
    assert len(compared(*runs).stdout.splitlines()) == 2 + 7


def test_deviations_are_to_the_digits_of_the_means(tmp_path: Path) -> None:
    for name, values in (("a", (12e3, 14e3)), ("b", (1230.0, 1240.0))):
        runs = [run(tmp_path / f"{name}{seed}", result(value), seed=seed) for seed, value in enumerate(values)]
        row = compared(*runs, "--over-seeds").stdout.splitlines()[2]
        assert row.endswith("| 1.300e+04 ± 1414 |" if name == "a" else "| 1235 ± 7 |")


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.2}, {"teacher": "u"}, {"images": 641}, {"nfe": 4}, {"method": {"name": "ect", "k": 1}}],
    ids=str,
)
def test_whatever_else_differs_has_a_row_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    of_result = {name: value for name, value in other.items() if name in ("images", "nfe")}
    of_run = {name: value for name, value in other.items() if name not in of_result}
    runs = [run(tmp_path / "a", result(1.0)), run(tmp_path / "b", result(2.0, **of_result), seed=1, **of_run)]
    assert "±" not in "".join(compared(*runs, "--over-seeds").stdout.splitlines()[:-1])


def test_what_a_run_measures_on_its_way_and_files_of_results(tmp_path: Path) -> None:
    """The first does not move its weights; of a file it is not known which recipe it is of."""
    runs = [
        run(tmp_path / "a", result(1.0)),
        run(tmp_path / "b", result(2.0), seed=1, evaluation={"protocol": "digits"}),
    ]
    (tmp_path / "c.json").write_text(results_json([result(4.0)]))
    table = compared(*runs, tmp_path / "c.json", tmp_path / "c.json", "--over-seeds").stdout.splitlines()
    assert [line.split(" | ")[-1] for line in table[2:5]] == ["1.500 ± 0.707 |", "4.000 |", "4.000 |"]


def test_what_runs_hold_of_their_teacher_is_one_row(tmp_path: Path) -> None:
    of_teacher = replace(result(9.0, nfe=7), provenance={"source": "t", "source_sha256": "ab"})
    of_another = replace(of_teacher, metrics={"fd_pixels": 8.0}, provenance={"source": "u", "source_sha256": "cd"})
    runs = [run(tmp_path / "a-0", result(1.0), of_teacher), run(tmp_path / "a-1", result(2.0), of_teacher, seed=1)]
    runs.append(run(tmp_path / "b", of_another, teacher="u"))
    for folder in runs:
        tiny_generator(folder / "generator")
    rows = [line.split(" | ") for line in compared(*runs, "--over-seeds").stdout.splitlines()[2:]]
    shown = {(row[0].removeprefix(f"| {tmp_path}/"), row[-1]) for row in rows if len(row) > 1}
    assert shown == {
        ("a-{0,1}, 640 images seen", "1.500 ± 0.707 |"),
        ("a-0, teacher", "9.000 |"),
        ("b, teacher", "8.000 |"),
    }


def test_runs_that_train_teachers(tmp_path: Path) -> None:
    """Their results name no method, but the images seen: runs of other numbers are no repetitions."""
    for seed in range(3):
        checkpoint = tiny_generator(
            tmp_path / f"a-{seed}" / "generator", stage="teacher", images_seen=64 + 64 * (seed // 2)
        )
        measured = evaluate(load_model(checkpoint), protocol="pixels", reference="digits", seeds=range(2))
        assert is_of_teacher(measured)
        run(checkpoint.parent, replace(measured, metrics={"fd_pixels": 1.0 + seed}), seed=seed)
    rows = compared(*sorted(tmp_path.iterdir()), "--over-seeds").stdout.splitlines()[2:4]
    assert [row.partition(" | 63 | ")[0] for row in rows] == [
        f"| {tmp_path}/a-{{0,1}}, 64 images seen | 2",
        f"| {tmp_path}/a-2, 128 images seen | 1",
    ]


def test_a_copy_of_a_run_does_not_count_twice(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, result(1.0), seed=3) for name in "ab"]
    refused = compared(*runs, "--over-seeds")
    assert refused.exit_code == 2
    assert "are runs of one recipe and one training.seed, 3, which would count twice: leave one" in refused.stderr


def test_results_of_other_seeds_are_left_out_on_request(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", result(1.0), result(2.0, seeds="9-17"))
    refused = compared(folder)
    assert refused.exit_code == 2
    assert f"both are of {folder}: add --seeds 0-8, or --seeds 9-17" in refused.stderr
    chosen = compared(folder, "--seeds", "9-17")
    assert chosen.exit_code == 0, chosen.output
    assert [line.split(" | ")[-1] for line in chosen.stdout.splitlines()[2:]] == ["2.000 |"]
    assert f"{folder} has no results of the seeds 0-3, but of 0-8, 9-17" in compared(folder, "--seeds", "0-3").stderr
