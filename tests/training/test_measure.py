"""Metrics over training: eval's own numbers, nothing trained depends on them, and the best average is kept."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from ranks import Rank, in_ranks
from safetensors.torch import save_file

from edmdistill.checkpoints.config import read_config
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.source import file_digest
from edmdistill.checkpoints.store import load_tensors
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import EdmDistillError, NotFiniteError, RecipeError, TrainingError
from edmdistill.evaluation import diagnosis, panel
from edmdistill.evaluation.diagnosis import diagnose, read_measures
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.shards import measure_all
from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import EvaluationTable, Recipe
from edmdistill.report.sections import DIAGNOSED, single_jumps, training
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training import measure
from edmdistill.training.run import Run
from edmdistill.training.session import train

TABLE = EvaluationTable(protocol="digits", every=16, n=20, nfe=(1, 2), diagnose=True)
KEY = "fd_digits@20/1 NFE"


def measured(start: Callable[..., Run], table: EvaluationTable = TABLE, **training: object) -> Run:
    run = start("cosim", **training)
    run.recipe = replace(run.recipe, evaluation=table)
    return run


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "run"
    assert train(measured(start), folder, on_message=lambda sentence: None).finished
    return folder


def test_the_numbers_are_evals(run_dir: Path) -> None:
    *_, last = lines(run_dir)
    for nfe in (1, 2):
        result = evaluate(
            load_generator(run_dir), protocol="digits", sampler=SamplerSpec(nfe=nfe), seeds=range(20), source="a run"
        )
        assert {name: last[f"{name}/{nfe} NFE"] for name in result.metrics} == pytest.approx(result.metrics, rel=1e-6)
    assert [KEY in line for line in lines(run_dir)] == [True, True]


def test_the_diagnosis_is_that_of_the_command(run_dir: Path, teacher: Path) -> None:
    """Between the averages: the states of both hold the auxiliary score in training."""
    found = [read_measures(line) for line in lines(run_dir)]
    asked = diagnose(run_dir, protocol="digits", teacher=teacher, count=20)
    for one, other in zip(found[-1], asked, strict=True):
        assert torch.tensor(one).tolist() == [pytest.approx(row, rel=1e-3) for row in torch.tensor(other).tolist()]
    assert found[0].jumps != found[-1].jumps
    assert [jump.teacher for jump in found[0].jumps] == [jump.teacher for jump in found[-1].jumps], "it is frozen"
    page = single_jumps(lines(run_dir))
    assert "the teacher's denoiser" in unescape(page)
    assert page.count("<svg") == 3
    assert single_jumps([{"images": 8.0}]) == ""


def test_a_run_that_measures_nothing_does_without_scipys_linear_algebra() -> None:
    """Its import would make every start slower."""
    code = "import sys, edmdistill.training.session; assert 'scipy.linalg' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_weights_of_a_feature_space_may_be_a_file(start: Callable[..., Run], run_dir: Path, tmp_path: Path) -> None:
    """Metrics and jumps are measured in it, and the metrics named after it."""
    tensors = {name: 2 * tensor for name, tensor in load_tensors(EMBEDDED["digits"].features)[0].items()}
    save_file(tensors, tmp_path / "twice.safetensors")
    table = replace(TABLE, weights={"digits": str(tmp_path / "twice.safetensors")}, nfe=(1,))
    assert train(measured(start, table), tmp_path / "run", on_message=lambda sentence: None).finished
    (line, *_), (official, *_) = lines(tmp_path / "run"), lines(run_dir)
    key = f"fd_digits[{file_digest(tmp_path / 'twice.safetensors')[:8]}]@20/1 NFE"
    assert line[key] != official[KEY]
    assert all(value != official[name] for name, value in line.items() if name.startswith("jump/generator/"))
    assert (tmp_path / "run" / "best").is_dir()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"inception": "inception.pt"}, "weights of inception were given, but the metrics are measured in digits"),
        ({"digits": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_before_training(
    weights: dict[str, str], sentence: str, start: Callable[..., Run]
) -> None:
    with pytest.raises(EdmDistillError, match=sentence):
        measure.open_evaluation(measured(start, replace(TABLE, weights=weights)))


def test_a_teacher_in_the_hosts_memory_is_diagnosed(start: Callable[..., Run], run_dir: Path, tmp_path: Path) -> None:
    run = start("cosim", machine=Machine("cpu", offload=("teacher", "ema")))
    run.recipe = replace(run.recipe, evaluation=TABLE)
    assert train(run, tmp_path / "run", on_message=lambda sentence: None).finished
    found, expected = (read_measures(lines(folder)[-1]) for folder in (tmp_path / "run", run_dir))
    assert found.gaps
    assert found.measures() == pytest.approx(expected.measures(), rel=1e-3)


def test_a_diagnosis_that_is_not_finite_is_told_and_leaves_the_rest(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gaps(*args: object, **options: object) -> object:
        raise NotFiniteError("the score gap is not finite")

    monkeypatch.setattr(diagnosis, "score_gaps", gaps)
    said: list[str] = []
    assert train(measured(start), tmp_path / "run", on_message=said.append).finished
    assert "Not diagnosed after 24 images: the score gap is not finite." in said
    last = lines(tmp_path / "run")[-1]
    assert KEY in last
    assert not any(name.startswith(DIAGNOSED) for name in last)


def test_steps_whose_samples_are_not_finite_are_told_and_others_are_not_the_best_for_them(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(*args: Any, sampler: SamplerSpec, **options: Any) -> object:
        if sampler.nfe == 1:
            raise NotFiniteError("3 of 20 images are not finite")
        return evaluate(*args, sampler=sampler, **options)

    monkeypatch.setattr(measure, "evaluate", some)
    said: list[str] = []
    run = measured(start, replace(TABLE, diagnose=False))
    assert train(run, tmp_path / "run", on_message=said.append).finished
    assert "Not measured after 24 images: 3 of 20 images are not finite." in said
    last = lines(tmp_path / "run")[-1]
    assert KEY not in last
    assert KEY.replace("1 NFE", "2 NFE") in last
    assert not (tmp_path / "run" / "best").exists()


def test_a_teacher_in_training_is_not_diagnosed(start: Callable[..., Run]) -> None:
    run = start("diffusion")
    run.recipe = replace(run.recipe, evaluation=TABLE)
    with pytest.raises(TrainingError, match="this run trains a teacher: leave it out"):
        measure.open_evaluation(run)


def test_what_is_trained_is_the_same(run_dir: Path, whole: Callable[..., tuple[Run, Path]]) -> None:
    _, plain = whole("cosim")
    without, found = (load_tensors(folder / "generator" / "model.safetensors")[0] for folder in (plain, run_dir))
    assert all(torch.equal(without[name], found[name]) for name in without)
    other = ("seconds", "memory", "images_per_second")
    for before, after in zip(lines(plain), lines(run_dir), strict=True):
        assert {k: v for k, v in before.items() if k not in other} == {
            k: v for k, v in after.items() if k not in other and "NFE" not in k and not k.startswith(DIAGNOSED)
        }
    assert read_config(run_dir / "generator").recipe_hash == read_config(plain / "generator").recipe_hash


def test_the_best_is_kept(run_dir: Path) -> None:
    best = min(lines(run_dir), key=lambda line: line[KEY])
    assert read_config(run_dir / "best").images_seen == best["images"]
    result = evaluate(load_generator(run_dir / "best"), protocol="digits", sampler=SamplerSpec(nfe=1), seeds=range(20))
    assert result.metrics["fd_digits@20"] == pytest.approx(best[KEY], rel=1e-6)


def test_the_report_shows_the_curve(run_dir: Path) -> None:
    assert "fd digits@20, 1 NFE" in training(lines(run_dir))


def test_a_run_far_above_its_best_is_stopped(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([1.0, 1.9, 2.1])
    monkeypatch.setattr(measure.Evaluation, "measure", lambda *args: {"fd_digits@20/1 NFE": next(values)})
    run = measured(start, replace(TABLE, every=8), images=40, log_every=8)
    said: list[str] = []
    with pytest.raises(TrainingError, match=r"fd_digits@20/1 NFE is 2.1, and it was 1 at its best") as error:
        train(run, tmp_path / "run", stop_on=["quality"], on_message=said.append)
    assert f"from these weights by --init {tmp_path / 'run/best'}, or from the start" in str(error.value)
    assert "healthy" not in str(error.value)  # of the states, which would contradict the best average
    assert not any("2.1" in sentence for sentence in said)  # it is said once
    assert read_config(tmp_path / "run" / "best").images_seen == 8
    assert [line[KEY] for line in lines(tmp_path / "run")] == [1.0, 1.9, 2.1]


def test_the_table_is_checked(recipe: Callable[..., Recipe]) -> None:
    plain = recipe("cosim")
    tables = plain.tables()
    assert "evaluation" not in tables
    table = {"protocol": "digits", "every": 32}
    with_table = Recipe.from_tables(tables | {"evaluation": table}, "a test")
    assert with_table.hash == plain.hash
    assert Recipe.from_json(with_table.to_json()) == with_table
    for wrong, why in (
        ({"every": 24}, "must be a multiple of"),
        ({"nfe": []}, "must be a list of at least 1 value"),
        ({"more": 1}, "no key"),
    ):
        with pytest.raises(RecipeError, match=why):
            Recipe.from_tables(tables | {"evaluation": table | wrong}, "a test")


def test_a_run_may_be_measured_from_now_on(
    start: Callable[..., Run], whole: Callable[..., tuple[Run, Path]], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(whole("cosim")[1], tmp_path / "run")
    assert train(measured(start), run_dir, on_message=lambda sentence: None).finished
    assert json.loads((run_dir / "recipe.resolved.json").read_text())["evaluation"]["n"] == 20


PARTS = {"reference": (panel, "_collect"), "metrics": (measure, "evaluate"), "gaps": (diagnosis, "score_gaps")}
OF_THE_CLOCK = "seconds", "memory", "images_per_second"


@pytest.mark.parametrize(
    ("images", "part", "killed"),
    [
        pytest.param(16, "reference", False, marks=pytest.mark.slow),
        (16, "metrics", True),
        pytest.param(24, "metrics", False, marks=pytest.mark.slow),
        (24, "gaps", True),
    ],
)
def test_a_stop_gives_up_the_evaluation_which_is_made_on_resuming(
    start: Callable[..., Run],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    part: str,
    killed: bool,
) -> None:
    """The run that nothing disturbs, with each evaluation once; 24 images are its end.

    killed: a process wrote the lines that follow, and was killed before its next state.
    """
    folder, made, run = tmp_path / "run", list[str](), measured(start)

    def in_part(name: str, act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        made.append(name)
        if name == part and run.images == images and not (folder / "state" / f"{images:012d}").exists():
            signal.raise_signal(signal.SIGTERM)
        return act(*args, **options)

    for name, (module, attribute) in PARTS.items():
        monkeypatch.setattr(module, attribute, partial(in_part, name, getattr(module, attribute)))
    assert train(run, folder, on_message=lambda sentence: None) == (False, images)
    assert (folder / "metrics.jsonl").exists() == (images == 24)
    made.clear()
    if killed:
        shutil.copy(run_dir / "metrics.jsonl", folder)
    run = measured(start)
    assert train(run, folder, on_message=lambda sentence: None) == (True, 24)
    evaluations = 2 if images == 16 else 1
    assert Counter(made) == {"reference": 1, "metrics": 2 * evaluations, "gaps": evaluations}

    for line, other in zip(lines(folder), lines(run_dir), strict=True):
        assert {**line, **{name: other[name] for name in OF_THE_CLOCK}} == other
    for product in ("generator", "best"):
        one, two = (load_tensors(path / product / "model.safetensors")[0] for path in (folder, run_dir))
        assert all(torch.equal(one[name], two[name]) for name in two)
    made.clear()
    assert train(measured(start), folder, on_message=lambda sentence: None).finished
    assert not made


def test_processes_leave_an_evaluation_together() -> None:
    """Where one of them is asked to stop, all do so before the same batch."""
    stop = Event()

    def act(rank: Rank) -> int:
        done: list[int] = []

        def on_progress(count: int) -> None:
            done.append(count)
            if rank.rank == 1 and len(done) == 3:
                stop.set()

        processes = measure.StoppableProcesses(rank, stop if rank.rank == 1 else Event())  # type: ignore[arg-type]
        batches = measure_all(
            100, 5, lambda rows: ((one, {}) for one in rows), processes=processes, on_progress=on_progress
        )
        with pytest.raises(measure.EvaluationStopped):
            list(batches)
        return len(done)

    assert in_ranks(3, act) == [3, 3, 3]
