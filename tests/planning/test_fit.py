"""`--fit`: less memory leads to slower ways, and what is chosen takes what a plan of it says."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.machine.gpus import GPU, HERE
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.planning import fit as module
from edmdistill.planning import outlines
from edmdistill.planning.document import PlanRequest
from edmdistill.planning.fit import (
    COARSE,
    CONTEXT,
    Fitted,
    fit,
    fit_request,
    fit_run,
    main_choice,
    options,
    spilled,
    ways,
)
from edmdistill.planning.plan import Measurement, make_plan, measure, used
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import Recipe
from edmdistill.training.micro_batch import HEADROOM

RECIPE = load_recipe("sid/digits", "sid", ["training.batch=64"])
GPU_AT_HAND = GPU(1e9, 1e13, 1e13, 1e13, 1e-9)


@cache
def flow() -> FlowNetwork:
    torch.manual_seed(0)
    return FlowNetwork(UNet(8, 1, 10, 64, [1], num_blocks=1, attn_resolutions=[], channels_per_head=32), EDM())


@cache
def measured(checkpointing: bool, loss_pieces: int, teacher: bool, shard: bool) -> Measurement:
    lent = ("teacher",) if teacher else ()
    return measure(RECIPE, flow(), Machine(None, None, shard, lent, checkpointing, loss_pieces=loss_pieces))


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one recipe are measured once in each way."""

    def remembered(recipe, flow, machine, *, guide):
        return measured(machine.checkpointing, machine.loss_pieces, "teacher" in machine.offload, machine.shard)

    monkeypatch.setattr(module, "measure", remembered)


@pytest.mark.slow
def test_less_memory_leads_to_slower_ways() -> None:
    whole = make_plan(measured(False, 1, False, False)).peak(64, accumulates=False)
    everything = fit(RECIPE, flow(), Machine(), 2 * whole, GPU_AT_HAND)
    assert (options(everything.machine), everything.peak) == ("--micro-batch 64", whole)
    chosen, seconds, memory = [], 0.0, whole / (1 - HEADROOM)
    least = make_plan(measured(True, 1, True, False), Machine(offload=("ema", "teacher", "optimizer"))).peak(1)
    with pytest.raises(TrainingError, match="not even one image fits in"):
        fit(RECIPE, flow(), Machine(), 0.99 * least / (1 - HEADROOM), GPU_AT_HAND)
    while memory * (1 - HEADROOM) >= least:
        fitted = fit(RECIPE, flow(), Machine(), memory, GPU_AT_HAND)
        machine = fitted.machine
        assert (
            fitted.seconds >= seconds / COARSE
        )  # a way that is not exact may be a little faster than the last exact one
        assert fitted.peak <= (1 - HEADROOM) * memory
        assert used(machine, RECIPE, 1, machine.micro_batch) == machine
        lean = "teacher" in machine.offload
        plan = make_plan(measured(machine.checkpointing, machine.loss_pieces, lean, False), machine)
        assert fitted.peak == plan.peak(machine.micro_batch, accumulates=machine.micro_batch < 64)
        chosen.append(options(machine))
        seconds, memory = fitted.seconds, 0.8 * memory
    assert chosen[0] == "--micro-batch 64"
    assert "--checkpoint-activations" in chosen[-1]
    assert {*machine.offload} == {"ema", "teacher", "optimizer"}
    assert len(set(chosen)) > 4


def test_a_rounded_moment_is_chosen_where_it_saves_much_or_nothing_else_fits() -> None:
    """Without moving anything to the host: the leanest way that is exact takes 4 bytes a parameter, and this one 2."""
    machine = Machine(micro_batch=8, checkpointing=True, loss_pieces=4)
    plan = make_plan(measured(True, 4, False, False), machine)
    rounded = plan._replace(optimizer=plan.optimizer // 2)
    for peak, moment in ((plan.peak(8), "fp32"), (rounded.peak(8), "bf16")):
        fitted = fit(RECIPE, flow(), machine, (peak + 1) / (1 - HEADROOM), GPU_AT_HAND, spill=False)
        assert (fitted.machine.second_moment, fitted.peak) == (moment, peak)
        assert ("--second-moment bf16 --micro-batch 8" in fitted.sentence) == (moment == "bf16")
        assert fitted.sentence.endswith("without bias." if moment == "bf16" else " GB.")
    # Where the host has room, the optimizer's way there takes time.
    fitted = fit(RECIPE, flow(), machine._replace(offload=("ema",)), rounded.peak(8) / (1 - HEADROOM), GPU_AT_HAND)
    assert fitted.machine.second_moment == "fp32"


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("asked", [1, 4])
def test_a_loss_has_no_more_pieces_than_its_micro_batch_has_images(rows: int, asked: int) -> None:
    """The plan is of what the run does, whatever was asked for."""
    coarse = Machine(checkpointing=True, second_moment="bf16")
    room = (make_plan(measured(True, rows, False, False), coarse).peak(rows) + 1) / (1 - HEADROOM)
    fitted = fit(RECIPE, flow(), coarse._replace(loss_pieces=asked), room, GPU_AT_HAND, spill=False)
    machine, size = fitted.machine, fitted.machine.micro_batch
    assert used(machine, RECIPE, 1, size) == machine
    assert fitted.peak == make_plan(measured(True, machine.loss_pieces, False, False), machine).peak(size)


def test_what_the_user_asks_for_stays() -> None:
    asked = Machine(micro_batch=16, checkpointing=True, loss_pieces=4, offload=("optimizer",))
    machine = fit(RECIPE, flow(), asked, 1e9, GPU_AT_HAND).machine
    assert machine == asked
    sharded = fit(RECIPE, flow(), asked._replace(shard=True, offload=()), 1e9, GPU_AT_HAND, processes=4, spill=False)
    share = make_plan(measured(True, 4, False, True), sharded.machine, processes=4)
    assert sharded.peak == share.peak(16, accumulates=False)
    sharded = sharded.machine
    assert (sharded.shard, sharded.offload, sharded.micro_batch) == (True, (), 16)
    with pytest.raises(TrainingError, match="leave out --micro-batch auto"):
        fit(RECIPE, flow(), Machine(micro_batch="auto"), 1e9, GPU_AT_HAND)


def test_the_ways_that_are_tried() -> None:
    """By what is recomputed, in how many pieces, and whether the teacher waits in the host's memory."""

    def tried(recipe: Recipe = RECIPE, spill: bool = True, **asked: Any) -> list[tuple[bool, int, tuple[str, ...]]]:
        return [(way.checkpointing, way.loss_pieces, way.offload) for way in ways(recipe, Machine(**asked), spill)]

    plain = [(False, 1, ()), (False, 4, ())]
    lent = [(True, 1, ()), (True, 1, ("teacher",)), (True, 4, ()), (True, 4, ("teacher",))]
    assert tried() == plain + lent
    assert tried(spill=False) == [*plain, (True, 1, ()), (True, 4, ())]
    assert tried(checkpointing=True) == lent
    assert tried(loss_pieces=2, spill=False) == [(False, 2, ()), (True, 2, ())]
    assert tried(offload=("ema",))[3] == (True, 1, ("ema", "teacher"))
    assert {offload for *_, offload in tried(offload=("teacher",))} == {("teacher",)}
    whole = load_recipe("diffusion/digits")  # it has no teacher, and a loss that is not split
    assert tried(whole) == [(False, 1, ()), (True, 1, ())]


def test_a_slow_gpu_waits_for_the_host_and_a_fast_one_does_not() -> None:
    """The time of what the host computes and moves does not depend on the share of the GPU's peak speed."""
    room = 0.127 * make_plan(measured(False, 1, False, False)).peak(64, accumulates=False)
    slow, fast = (fit(RECIPE, flow(), Machine(), room, GPU_AT_HAND, utilization=share) for share in (0.02, 1.0))
    assert ("optimizer" in slow.machine.offload, "optimizer" in fast.machine.offload) == (True, False)
    assert slow.seconds > fast.seconds


def test_what_else_of_a_way_is_tried() -> None:
    """Averages and Adam in the host's memory; half its second moment where it is not there."""

    def tried(optimizer: str = "adam", spill: bool = True, **asked: Any) -> list[tuple[tuple[str, ...], str]]:
        recipe = replace(RECIPE, training=replace(RECIPE.training, optimizer=optimizer))
        return [(way.offload, way.second_moment) for way in spilled(recipe, Machine(**asked), spill)]

    both = [((), "fp32"), ((), "bf16")]
    ema = [(("ema",), "fp32"), (("ema",), "bf16")]
    assert tried() == [*both, *ema, (("optimizer",), "fp32"), (("ema", "optimizer"), "fp32")]
    assert tried(spill=False) == both
    assert tried("radam") == [((), "fp32"), (("ema",), "fp32")]
    assert tried(second_moment="bf16", spill=False) == [((), "bf16")]
    assert tried(offload=("optimizer",)) == [(("optimizer",), "fp32"), (("optimizer", "ema"), "fp32")]


class Asked(Exception):
    """Ends a search, with what was asked for."""


def asked_for(*given: Any, **more: Any) -> None:
    raise Asked(given, more)


def test_the_guide_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", asked_for)
    with pytest.raises(Asked) as asked:
        fit(RECIPE, flow(), Machine(), 1e9, GPU_AT_HAND, guide="guide")
    assert asked.value.args[1] == {"guide": "guide"}


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_is_fitted_with_all_that_was_named(shard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fit", asked_for)
    monkeypatch.setattr(module, "outline_teacher", lambda recipe, *given: given)
    monkeypatch.setattr(module, "outline_guide", lambda guide: f"shape of {guide}")
    monkeypatch.setattr(module, "measure_this_machine", lambda: GPU_AT_HAND)
    monkeypatch.setattr(module, "pick_device", torch.device)
    monkeypatch.setattr(module, "outline", lambda init: f"shape of {init}")
    monkeypatch.setattr(module, "drop_second_time", lambda flow: (flow, "one time"))
    made, learnt = load_recipe("diffusion/digits"), load_recipe("sct/digits")
    for device, recipe, teacher, init, source in (
        ("cuda", RECIPE, "teacher", "generator", ("teacher", None, None)),  # the data give no shape
        ("cuda", made, "teacher", None, ("teacher", None, None)),
        ("cpu", made, None, None, (None, None, "digits")),
        ("cpu", learnt, None, "generator", ("shape of generator", "one time")),
    ):
        machine = Machine(device, shard=shard)
        with pytest.raises(Asked) as asked:
            fit_run(recipe, machine, 5e9, data="digits", teacher=teacher, guide="guide", init=init, processes=3)
        given, more = asked.value.args
        assert given == (recipe, source, machine, 5e9, GPU_AT_HAND)
        assert (more["guide"], more["processes"]) == ("shape of guide", 3)
        assert more["spill"] == (device == "cuda" and not shard)


def test_a_plan_is_of_what_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the memory that is named, or the GPU's; where all are listed, it is this machine's that is meant."""
    monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
    named = GPU_AT_HAND._replace(memory=7e9)
    every = {"another": GPU_AT_HAND, HERE: named}
    for memory, room, shard, gpus in (
        (3e9, 3e9, False, {"one": named}),
        ("auto", 7e9, True, {"one": named}),
        (3e9, 3e9, False, every),
        ("auto", 7e9 - CONTEXT, True, every),
    ):
        request = PlanRequest(RECIPE, flow(), None, Machine(shard=shard), 2, 16, gpus, 0.5)._replace(guide="guide")
        seen: list[Any] = []

        def fitted(*given: Any, seen: list[Any] = seen, **more: Any) -> Fitted:
            seen += [*given[2:], more["guide"], more["processes"], more["spill"], more["utilization"]]
            return Fitted(Machine(checkpointing=True, micro_batch=4), 1e9, 1, 1.0)

        monkeypatch.setattr(module, "fit", fitted)
        chosen, way = fit_request(request, memory, lambda stage: None)
        asked = Machine(shard=shard, micro_batch=16)
        assert seen == [asked, room, named, "guide", 2, not shard, 0.5]
        assert (chosen.machine.checkpointing, chosen.machine.micro_batch, chosen.micro_batch) == (True, 4, 4)
        assert way.sentence.startswith("--fit chooses --checkpoint-activations --micro-batch 4")


def test_all_processes_take_the_way_of_the_main_one(monkeypatch) -> None:
    """Each measures the speed of its own GPU, by which it might choose another."""
    sent: list[int] = []

    class OneOfTwo:
        def __init__(self, machine: Machine) -> None:
            self.is_main = not sent

        def on_main(self, act):
            return act() if self.is_main else None

        def broadcast(self, number):
            if self.is_main:
                sent.append(int(number))
                return int(number)
            return sent.pop(0)

    monkeypatch.setattr(module, "Engine", OneOfTwo)
    asked = Machine("cpu", log_with=("tensorboard",))
    way = asked._replace(checkpointing=True, micro_batch=3, loss_pieces=4, offload=("ema", "optimizer"))
    way = way._replace(second_moment="bf16")
    chosen, sentence = main_choice(asked, lambda: Fitted(way, 1e9, 1, 1.0))
    assert (chosen, sentence.startswith("--fit chooses")) == (way._replace(planned=True), True)
    assert main_choice(asked, lambda: Fitted(asked, 1e9, 1, 1.0)) == (chosen, "")


def test_on_a_cpu_the_memory_is_named_and_nothing_moves(monkeypatch) -> None:
    def run(memory):
        return fit_run(RECIPE, Machine("cpu"), memory, data="digits", teacher="teacher", guide=None, processes=1)

    monkeypatch.setattr(outlines, "outline", lambda teacher: flow())
    with pytest.raises(TrainingError, match="name the memory, as in --fit 12GB"):
        run("auto")
    leanest = make_plan(measured(True, 1, False, False), Machine(second_moment="bf16"))
    least = leanest.peak(1) / (1 - HEADROOM)
    fitted = run(1.05 * least)
    assert fitted.machine.checkpointing
    assert not fitted.machine.offload
    assert fitted.sentence.startswith("--fit chooses --checkpoint-activations ")
    with pytest.raises(TrainingError, match="not even one image fits"):
        run(0.9 * least)


def test_a_gpu_is_asked_for_its_memory_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, which `measure_this_machine` finds as the current one."""
    asked: list[object] = []
    properties = SimpleNamespace(total_memory=GPU_AT_HAND.memory + CONTEXT)
    monkeypatch.setattr(module, "pick_device", lambda name: asked.append(name) or torch.device(name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(str(device)) or properties)
    monkeypatch.setattr(module, "measure_this_machine", lambda: GPU_AT_HAND)
    monkeypatch.setattr(outlines, "outline", lambda teacher: flow())
    chosen = fit_run(RECIPE, Machine("cuda:1"), "auto", data="digits", teacher="teacher", guide=None, processes=1)
    assert asked == ["cuda:1", "cuda:1"]
    assert chosen.memory == GPU_AT_HAND.memory
    assert chosen.peak < chosen.memory
