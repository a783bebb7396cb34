"""The plan of a run beside what the run measured: units, and what follows from what."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import SESSION, SMALL

from edmdistill.checkpoints.config import NetworkSpec
from edmdistill.checkpoints.store import build_flow
from edmdistill.machine.gpus import GPUS, UTILIZATION
from edmdistill.recipes.library import load_recipe
from edmdistill.report import plan_comparison
from edmdistill.report.plan_comparison import (
    PlanComparison,
    _bytes,
    _number,
    _operations,
    compare_with_plan,
)
from edmdistill.report.summary import read_run


def compared(run: Path, *sets: str, recipe: str = "cosim/digits-quickstart", **session: Any) -> PlanComparison:
    """Of the run by another recipe, in a session."""
    resolved = load_recipe(recipe, sets=["training.images=1000", *sets])
    (run / "recipe.resolved.json").write_bytes(resolved.to_json())
    (run / "sessions.jsonl").write_text(json.dumps(SESSION | session) + "\n")
    return compare_with_plan(read_run(run))


def size(comparison: PlanComparison, row: str) -> float:
    """A number of the plan, in the unit that it has."""
    return float(next(plan for name, plan, _ in comparison.rows if name.strip() == row).split()[0].replace(",", ""))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes to the last one, and a GPU that is bound by its multiplications alone."""
    monkeypatch.setattr(plan_comparison, "_bytes", str)
    monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(launch=1e-15, half=8e12, single=2e12))


def turn(comparison: PlanComparison) -> str:
    return next(name.strip() for name, *_ in comparison.rows if "turn" in name)


def test_speed_and_memory_are_those_of_the_session(full: Path):
    batch = load_recipe("cosim/digits-quickstart").training.batch
    one, two = compared(full), compared(full, "training.precision=bf16", processes=2, shard=True)
    speed, flops = size(one, "Images per second"), size(one, "Operations per image")  # GFLOP
    assert speed * flops == pytest.approx(UTILIZATION * 2e3, rel=0.01)
    assert size(one, "Operations per second") == pytest.approx(UTILIZATION * 2e3, rel=0.01)
    assert size(one, "Time for all images") == pytest.approx(1000 / speed, abs=0.5)
    assert size(two, "Images per second") == pytest.approx(2 * 4 * speed, rel=0.01)
    assert turn(one).endswith(f", {batch} images")
    assert turn(two) == turn(one).replace(str(batch), str(batch // 2))
    assert size(two, "optimizers") == pytest.approx(size(one, "optimizers") / 2, rel=0.1)


def test_a_pass_of_several_has_gradients_beside_it(full: Path):
    batch = load_recipe("cosim/digits-quickstart").training.batch
    whole, half = compared(full, micro_batch=batch), compared(full, micro_batch=batch // 2)
    gradients = size(whole, "optimizers") / 2 / 2  # Adam's two moments of the two networks that are trained
    assert size(half, turn(half)) == pytest.approx(size(whole, turn(whole)) / 2 + gradients, rel=0.1)
    parts = sum(size(half, part) for part in ("weights", "averages", "optimizers", turn(half)))
    assert size(half, "Peak memory") == parts


def test_a_loss_has_no_more_pieces_than_a_micro_batch_has_images(full: Path):
    whole, two, many = (compared(full, micro_batch=2, loss_pieces=pieces) for pieces in (1, 2, 8))
    assert size(two, "Peak memory") < size(whole, "Peak memory")
    assert many == two


def test_the_turn_is_the_longest_and_the_memory_the_most(full: Path):
    lines = [{"images": 500, "seconds": 4, "memory": 3e9}, {"images": 1000, "seconds": 8, "memory": 2e9}]
    (full / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(full)
    rows = {name.strip(): cells for name, *cells in found.rows}
    assert rows["Peak memory"][1] == "3000000000.0"
    assert rows["Images per second"][1] == "125"
    flops = size(found, "Operations per image")
    assert float(rows["Operations per second"][1].split()[0]) == pytest.approx(125 * flops, rel=0.01)
    assert turn(found).startswith("the generator's turn"), "which has the teacher and the auxiliary score in it"


def test_a_machine_that_is_not_known_has_no_times(full: Path):
    here = compared(full, device="A CPU, 2 cores", cuda=None)
    assert {plan for name, plan, _ in here.rows if name in ("Images per second", "Time for all images")} == {"-"}
    assert [note.split(",")[0] for note in here.notes] == [
        "The peak throughput of this machine is unknown",
        "On the CPU",
    ]
    (full / "sessions.jsonl").unlink()
    unknown = compare_with_plan(read_run(full))
    assert unknown.notes[0] == "This run has no record of its machine: the plan is for one process, unsharded."


def test_a_guide_counts_as_a_second_teacher(full: Path):
    """Neither reads the guidance weight that the generator of a range of weights reads."""
    plain = compared(full, "method.guidance=[1,2]", recipe="scd/digits")
    config = json.loads((full / "generator" / "config.json").read_text())
    config["network"]["arguments"]["guided"] = True
    (full / "generator" / "config.json").write_text(json.dumps(config))
    guided = compared(full, "method.guidance=[1,2]", 'method.guide="network"', recipe="scd/digits")
    assert any("guide is assumed to be as large as the teacher" in note for note in guided.notes)
    assert not any("guide" in note for note in plain.notes)
    flow = build_flow(NetworkSpec("edm2", SMALL), {"kind": "edm"}, "a test")
    teacher = sum(4 * parameter.numel() for parameter in flow.parameters())
    assert size(guided, "weights") - size(plain, "weights") == pytest.approx(teacher, rel=0.05)


def test_units():
    assert [_bytes(value) for value in (None, 123456, 999e6, 2.5e9, 1234e9)] == [
        *("-", "0.1 MB", "999.0 MB", "2.50 GB", "1,234.00 GB"),
    ]
    assert [_operations(value) for value in (None, 5e8, 2.5e11, 1e12, 1.5e15)] == [
        *("-", "0.5 GFLOP", "250 GFLOP", "1 TFLOP", "1.5e+03 TFLOP"),
    ]
    assert [_number(value) for value in (None, 0.123456, 999.0, 1234.5)] == ["-", "0.123", "999", "1,234"]
