"""The plan of a run as a document: speeds in closed form, and what adds up to the peak."""

from functools import cache
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from edmdistill.errors import duration
from edmdistill.machine.engine import Machine
from edmdistill.machine.gpus import GPU
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.planning import document as module
from edmdistill.planning.document import PlanRequest, plan_document, plan_text
from edmdistill.planning.plan import Measurement, Plan, make_plan, measure
from edmdistill.recipes.library import load_recipe

RECIPE = load_recipe("sid/digits", "sid", ["training.batch=64", "training.images=6400"])
BUSY = GPU(memory=1e12, half=4e12, tf32=2e12, single=1e12, launch=1e-12)
WAITING = GPU(memory=1e5, half=1e30, tf32=1e30, single=1e30, launch=1e-3)


@cache
def flow() -> FlowNetwork:
    torch.manual_seed(0)
    return FlowNetwork(UNet(8, 1, 10, 8, [1], num_blocks=1, attn_resolutions=[], channels_per_head=8), EDM())


@cache
def measured(precision: str, checkpointing: bool, shard: bool) -> Measurement:
    recipe = replace(RECIPE, training=replace(RECIPE.training, precision=precision))
    return measure(recipe, flow(), Machine(checkpointing=checkpointing, shard=shard))


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    def remembered(recipe, flow, machine, *_, guide):
        return measured(recipe.training.precision, machine.checkpointing, machine.shard)

    monkeypatch.setattr(module, "measure", remembered)


def request(precision: str = "fp32", micro_batch: int = 8, **machine: Any) -> PlanRequest:
    recipe = replace(RECIPE, training=replace(RECIPE.training, precision=precision))
    gpus = {"busy": BUSY, "waiting": WAITING}
    return PlanRequest(recipe, flow(), None, Machine(**machine), 2, micro_batch, gpus, utilization=0.5)


def planned(precision: str = "fp32", **machine: Any) -> Plan:
    asked = Machine(**machine)
    return make_plan(measured(precision, asked.checkpointing, asked.shard), asked, processes=2)


def document(asked: PlanRequest, alternatives: bool = False) -> dict[str, Any]:
    return plan_document(asked, lambda stage: None, alternatives)


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 1e12), ("tf32", 2e12), ("bf16", 4e12)])
def test_a_gpu_is_as_fast_as_its_operations_or_its_calls(precision: str, peak: float) -> None:
    """Two processes of half their peak; or four micro-batches of eight images each, one call after another."""
    found = document(request(precision))
    busy, waiting = found["gpus"]
    assert busy["images_per_second"] * found["flops_per_image"] == pytest.approx(0.5 * peak * 2)
    assert waiting["images_per_second"] == pytest.approx(64 / (4 * planned(precision).calls * 1e-3))
    for gpu in found["gpus"]:
        assert gpu["days"] * 86400 * gpu["images_per_second"] == pytest.approx(6400)
    assert busy.get("days_in_tf32", busy["days"]) == pytest.approx(busy["days"] / (2 if precision == "fp32" else 1))
    lines = plan_text(found, request(precision)).splitlines()
    assert [
        f"; {duration(43200 * busy['days'])} with --set training.precision=tf32" in line for line in lines[-2:]
    ] == [
        precision == "fp32",
        False,
    ]
    assert (busy["largest_micro_batch"], waiting["largest_micro_batch"]) == (32, 0)
    assert found["utilization"] == 0.5
    assert [request(precision)._replace(micro_batch=size).rows for size in (8, None)] == [8, 32]


@pytest.mark.parametrize("micro_batch", [8, 32])
def test_what_takes_memory_adds_up_to_the_peak(micro_batch: int) -> None:
    """Gradients wait beside the passes of a turn only if these are several."""
    found, plan = document(request(micro_batch=micro_batch, second_moment="bf16")), planned(second_moment="bf16")
    peak = found["peak"]
    assert sum(found["bytes"].values()) == peak["micro_batch"] == max(peak["turns"].values())
    assert peak["micro_batch"] == plan.peak(micro_batch, accumulates=micro_batch < 32)
    assert peak["one_image"] == plan.peak(1)
    assert found["bytes"]["DDP's buckets of gradients"] == plan.buckets > 0
    assert (found["cuda_graphs"], found["others"]) == (None, [])


def test_cuda_graphs_hold_the_passes_of_all_micro_batches() -> None:
    assert document(request(compile="reduce-overhead"))["cuda_graphs"] == planned().graphs(8, 4)


def test_a_loss_has_no_more_pieces_than_a_micro_batch_has_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    def noted(recipe, flow, machine, *_, guide):
        pieces.append(machine.loss_pieces)
        return measured("fp32", False, False)

    monkeypatch.setattr(module, "measure", noted)
    for asked in (1000, 2):
        document(request(loss_pieces=asked), alternatives=True)
    assert pieces == [8] * 9 + [2] * 9


def test_the_alternatives_are_plans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    others = document(request(), alternatives=True)["others"]
    assert len(others) == 8
    for other in others:
        machine = {name: other[name] for name in ("checkpointing", "shard")}
        plan = planned(other["precision"], **machine)
        assert (other["one_image"], other["micro_batch"]) == (plan.peak(1), plan.peak(8))
        assert other["largest_micro_batch"] == {"busy": 32, "waiting": 0}
    monkeypatch.setattr(module, "PRECISIONS", ("fp32",))
    coarse = replace(RECIPE, training=replace(RECIPE.training, optimizer="adam8bit"))
    for alone in (request()._replace(processes=1), request()._replace(recipe=coarse), request(offload=("ema",))):
        assert [other["shard"] for other in document(alone, alternatives=True)["others"]] == [False, False]
