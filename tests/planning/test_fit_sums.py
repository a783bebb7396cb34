"""`--fit` by hand: plans of round numbers, whose micro-batches and seconds follow in closed form."""

from typing import Any

import pytest
from msgspec.structs import replace
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.machine.gpus import GPU, UTILIZATION
from edmdistill.planning import fit as module
from edmdistill.planning.fit import ADAM_TRAFFIC, EMA_TRAFFIC, HOST_SPEED, Fitted, fit
from edmdistill.planning.plan import Measurement, Pass, Plan
from edmdistill.recipes.library import load_recipe
from edmdistill.training.micro_batch import HEADROOM

RECIPE = load_recipe("sid/digits", "sid", ["training.batch=64"])
BUSY = GPU(memory=1e9, half=2e12, tf32=1e12, single=1e12, launch=1e-15)
ALONE = Machine(checkpointing=True, loss_pieces=2)
"""Of its kind without the host's memory, but for the second moment."""
NETWORKS = {"teacher": nn.Linear(1, 1), "generator": nn.Linear(9, 10), "auxiliary": nn.Linear(1, 1)}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Plans for 1000 bytes of weights, 400 of Adam's, 100 of gradients, and 100 an image, or 50 if it is recomputed;
    recomputation takes twice the operations, and four pieces 7 bytes more. Gets the number of processes of each."""
    asked: list[int] = []

    def measure(recipe, flow, machine, *, guide) -> Measurement:
        each = 50 if machine.checkpointing else 100
        passes = {"generator": Pass(100, (((0, each),),), (((0, each),),))}
        flops = 2e9 if machine.checkpointing else 1e9
        lent = 3 * 10**9 if "teacher" in machine.offload else 0
        return Measurement(recipe, NETWORKS, passes, bool(lent), flops, 0.0, 1, lent)

    def make_plan(measured: Measurement, machine: Machine, processes: int) -> Plan:
        asked.append(processes)
        adam = 0 if "optimizer" in machine.offload else 400 if machine.second_moment == "fp32" else 200
        return Plan(
            {},
            {"all": 1007 if machine.loss_pieces == 4 else 1000},
            {"generator": 100},
            measured.passes,
            0,
            adam,
            0,
            0,
            False,
            measured.flops,
            0.0,
            1,
            1,
        )

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "make_plan", make_plan)
    return asked


def fitted(room: float, machine: Machine = ALONE, precision: str = "fp32", spill: bool = False, **more: Any) -> Fitted:
    recipe = replace(RECIPE, training=replace(RECIPE.training, precision=precision))
    return fit(recipe, None, machine, (room + 0.5) / (1 - HEADROOM), BUSY, spill=spill, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("room", "micro_batch", "peak"),
    [
        (1400 + 50 * 64, 64, 1400 + 50 * 64),  # the whole batch at once: its gradients come as activations go
        (1500 + 50 * 61, 32, 1500 + 50 * 32),  # several passes, and gradients beside them: even ones
        (1500 + 50 * 31, 22, 1500 + 50 * 22),
        (1500 + 50, 1, 1500 + 50),
    ],
)
def test_the_largest_micro_batch_that_fits_is_made_even(
    room: int, micro_batch: int, peak: int, planned: list[int]
) -> None:
    found = fitted(room)
    as_run = ALONE._replace(micro_batch=micro_batch, loss_pieces=min(2, micro_batch))
    assert (found.machine, found.peak) == (as_run, peak)
    assert found.memory == (room + 0.5) / (1 - HEADROOM)


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 1e12), ("bf16", 2e12)])
def test_the_seconds_of_a_round(precision: str, peak: float, planned: list[int]) -> None:
    """Operations at a share of the GPU's peak; and what is moved: averages, Adam's numbers, and a teacher each pass."""
    seconds = 64 * 2e9 / (UTILIZATION * peak)
    assert fitted(4550, precision=precision).seconds == pytest.approx(seconds)
    away = ALONE._replace(offload=("ema", "optimizer", "teacher"))
    moved = EMA_TRAFFIC * 400 + ADAM_TRAFFIC * 100 + 3e9 * 2  # 400 bytes of the generator; the teacher's twice
    found = fitted(4050, away, precision)
    assert (found.machine.micro_batch, found.seconds) == (32, pytest.approx(seconds + moved / HOST_SPEED, rel=1e-12))


@pytest.mark.parametrize(("sets", "averages"), [([], 1), (["ema.sigma_rel=[0.05,0.1]"], 3)])
def test_every_average_is_moved(sets: list[str], averages: int, planned: list[int]) -> None:
    recipe = load_recipe("sid/digits", "sid", ["training.batch=64", *sets])
    away = ALONE._replace(offload=("ema",))
    near, far = (fit(recipe, None, machine, 1e9, BUSY, spill=False) for machine in (ALONE, away))  # type: ignore[arg-type]
    assert far.seconds - near.seconds == pytest.approx(averages * EMA_TRAFFIC * 400 / HOST_SPEED, rel=1e-5)


def test_the_fastest_way_that_fits_is_chosen(planned: list[int]) -> None:
    assert fitted(1400 + 100 * 64, Machine()).machine == Machine(micro_batch=64)
    assert fitted(1500 + 100 * 40, Machine()).machine == Machine(micro_batch=32)  # rather than recompute
    assert set(planned) == {1}
    assert fitted(1500 + 100 * 40, Machine(), processes=3).machine == Machine(micro_batch=22)
    assert planned[-1] == 3


def test_one_pass_that_recomputes_may_be_faster_than_two(planned: list[int]) -> None:
    """Where launches take the time."""
    launches = BUSY._replace(launch=1.0)
    for room, expected in ((7800, Machine(micro_batch=64)), (7400, Machine(micro_batch=64, checkpointing=True))):
        memory = (room + 0.5) / (1 - HEADROOM)
        assert fit(RECIPE, None, Machine(), memory, launches).machine == expected  # type: ignore[arg-type]


def test_a_micro_batch_holds_whole_groups(planned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """16 groups of 4 images in three passes: of 6, 5 and 5, where the images alone would be 22, 21 and 21."""
    recipe = load_recipe("imm/digits", "imm", ["training.batch=64", "method.particles=4"])
    make_plan = module.make_plan
    monkeypatch.setattr(module, "make_plan", lambda *args: make_plan(*args)._replace(group_size=4))
    memory = (1500 + 100 * 27 + 0.5) / (1 - HEADROOM)
    found = fit(recipe, None, Machine(), memory, BUSY, spill=False)  # type: ignore[arg-type]
    assert (found.machine, found.peak) == (Machine(micro_batch=24), 1500 + 100 * 24)

    # 3 groups on 2 processes: where one has two of them and the other one, there is no second pass.
    recipe = load_recipe("imm/digits", "imm", ["training.batch=12", "method.particles=4"])
    memory = [(room + 0.5) / (1 - HEADROOM) for room in (1300 + 50 * 4, 1200 + 50 * 8)]
    with pytest.raises(TrainingError, match="not even 4 images fit"):
        fit(recipe, None, Machine(), memory[0], BUSY, processes=2, spill=False)  # type: ignore[arg-type]
    assert fit(recipe, None, Machine(), memory[1], BUSY, processes=2, spill=False).machine.micro_batch == 8  # type: ignore[arg-type]


def test_what_the_leanest_way_takes_is_said(planned: list[int]) -> None:
    with pytest.raises(TrainingError, match=r"not even one image fits in .*: the leanest way takes 1\.35e-06 GB"):
        fitted(1349, Machine())
    with pytest.raises(TrainingError, match=r"the leanest way takes 1\.15e-06 GB"):
        fitted(1149, Machine(), spill=True)
    with pytest.raises(TrainingError, match="not even one image fits"):  # 22 of one process in passes of one
        fitted(1500 + 50 - 200, processes=3)
