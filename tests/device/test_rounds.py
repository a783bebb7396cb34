"""Every method on a device that behaves like CUDA: no mixed devices, the CPU's numbers, and one wait a turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forked
from toy_runs import source_of

from edmdistill.methods import METHODS

SCRIPT = Path(__file__).parent / "rounds.py"
MEASURES = "tolist training/metrics.py"
"""Where a turn waits: for its measures, by which the run decides whether to step."""
ROUNDED = 1e-4
"""Relative distance of all trained numbers after rounds in float32: Adam divides small gradients by their own size."""
PAIRED = 1e-3
"""The same of TCM, whose loss is a difference of two passes at times so near that it loses two more digits."""


@pytest.fixture
def compare(teacher: Path, recipe: Any) -> Any:
    """compare((method, training, machine), ...): what rounds.py measures of each."""

    def run(*cases: tuple[str, dict[str, Any], dict[str, Any]], rounds: int = 1) -> list[dict[str, Any]]:
        asked = [
            (
                "compare",
                source_of(method, teacher) and str(source_of(method, teacher)),
                json.loads(recipe(method, images=8 * (rounds + 1), **training).to_json()),
                machine,
                rounds,
            )
            for method, training, machine in cases
        ]
        status, said = Forked(SCRIPT, json.dumps(asked)).finish()
        assert status == 0, said
        found: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
        return found

    return run


def by_cause(found: dict[str, Any]) -> dict[str, int]:
    """Waits by cause and file, without the line."""
    counts: dict[str, int] = {}
    for where, count in found["waits"].items():
        file = where.rpartition(":")[0]
        counts[file] = counts.get(file, 0) + count
    return counts


def test_a_turn_waits_once(compare: Any) -> None:
    cases = [("cosim", {}, {}), ("scd", {}, {"micro_batch": 4}), ("dscd", {}, {})]
    for found in compare(*cases):
        assert by_cause(found) == {MEASURES: found["turns"]}
        assert found["distance"] < ROUNDED
        assert found["kernels"] > 900


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_waits_once_a_turn(method: str, compare: Any) -> None:
    plain, split = compare((method, {}, {}), (method, {}, {"micro_batch": 2}), rounds=2)
    for found in (plain, split):
        assert by_cause(found) == {MEASURES: found["turns"]}
        assert found["distance"] < (PAIRED if method == "tcm" else ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["ctm", "scd", "sid"])
def test_half_precision_waits_no_more(method: str, precision: str, compare: Any) -> None:
    (found,) = compare((method, {"precision": precision}, {}), rounds=20 if precision == "fp16" else 2)
    assert by_cause(found) == {MEASURES: found["turns"]}
    assert found["distance"] < 0.1  # of 20 rounds in other layouts of memory, each rounded to 11 bits


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "checkpointing": ({}, {"checkpointing": True}, {}),
    "a loss in pieces": ({}, {"loss_pieces": 3}, {}),
    "workers": ({}, {"workers": 2}, {}),
    "radam": ({"optimizer": "radam"}, {}, {}),
    "a rounded second moment": ({"betas": [0.0, 0.99]}, {"second_moment": "bf16"}, {}),
    "clipping": ({"grad_clip": 1e-2}, {}, {}),
    "average on the host": ({}, {"offload": ["ema"]}, {"synchronize transfer.py": 1}),
    "optimizer on the host": ({}, {"offload": ["optimizer"]}, {"synchronize transfer.py": 2}),
    "teacher on the host": ({}, {"offload": ["teacher"]}, {}),
    "all on the host": (
        {},
        {"offload": ["ema", "optimizer", "teacher"], "checkpointing": True, "micro_batch": 4},
        {"synchronize transfer.py": 3},
    ),
}
"""Of training and of the machine, and the waits beside those of the measures."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_wait_as_often_as_they_say(name: str, compare: Any) -> None:
    training, machine, waits = OPTIONS[name]
    (found,) = compare(("cosim", training, machine), rounds=2)
    assert by_cause(found) == {MEASURES: found["turns"]} | waits
    assert found["distance"] < ROUNDED


@pytest.mark.slow
def test_the_micro_batch_is_the_largest_that_fits(teacher: Path, recipe: Any) -> None:
    """On devices of fewer and fewer bytes."""
    tables = json.loads(recipe("cosim").to_json())
    capacities = [4_000_000, 2_000_000, 1_500_000]
    machines = {"micro_batch": "auto"}, {"micro_batch": 8, "planned": True}
    cases = [["settle", str(teacher), tables, machine, capacity] for machine in machines for capacity in capacities]
    status, said = Forked(SCRIPT, json.dumps(cases)).finish()
    assert status == 0, said
    found = json.loads(said.splitlines()[-1])
    sizes = [case["size"] for case in found]
    assert sizes[0] == 8 > sizes[1] > sizes[2]
    assert sizes[3:] == sizes[:3]
    assert all(case["peak"] <= capacity for case, (*_, capacity) in zip(found, cases, strict=True))
