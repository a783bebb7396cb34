"""Plans in closed form: what adds up over turns, roles and averages, and what does not depend on how it is measured."""

from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from edmdistill.machine.engine import Machine
from edmdistill.methods.base import NoiseRange
from edmdistill.methods.pieces import Pieces
from edmdistill.networks import NETWORKS
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.planning import plan as module
from edmdistill.planning.envelope import peak
from edmdistill.planning.plan import Measurement, make_plan, measure
from edmdistill.recipes.library import load_recipe
from edmdistill.training.probe import Probe
from edmdistill.training.roles import effective_weights


@cache
def flow() -> FlowNetwork:
    torch.manual_seed(0)
    return FlowNetwork(UNet(8, 1, 10, 8, [1], num_blocks=1, attn_resolutions=[], channels_per_head=8), EDM())


def measured(*sets: str, name: str = "sid/digits", **machine: object) -> Measurement:
    return measure(load_recipe(name, sets=sets), flow(), Machine(**machine))


def numbers(network: FlowNetwork, part: str = "") -> int:
    return sum(p.numel() for name, p in network.named_parameters() if part in name)


def peaks(found: Measurement) -> dict[str, list[int]]:
    """By role, with and without gradients, of several sizes."""
    return {
        role: [peak(lines, images) for lines in (turn.total, turn.activations) for images in (1, 4, 24)]
        for role, turn in found.passes.items()
    }


def test_every_turn_of_a_round_counts() -> None:
    """Each of an auxiliary score's turns takes the same operations and calls; memory is that of one."""
    found = [measured(f"method.auxiliary_turns={turns}") for turns in (1, 2, 3)]
    for name in ("flops", "calls"):
        first, second, third = (getattr(each, name) for each in found)
        assert third - second == second - first > 0
        assert first > second - first  # the generator's turn, which goes through more networks
    assert peaks(found[0]) == peaks(found[2])


@pytest.mark.parametrize("turns", [1, 2])
def test_an_offloaded_teacher_is_lent_once_a_round(turns: int) -> None:
    """In the generator's turn alone; the head of its own loss, which is not called, stays. Recomputed blocks of its
    are loaded twice."""
    called = 4 * (numbers(flow()) - numbers(flow(), "logvar"))
    sets = f"method.auxiliary_turns={turns}"
    assert measured(sets).loaded == 0
    assert measured(sets, offload=("teacher",)).loaded == called
    twice = measured(sets, offload=("teacher",), checkpointing=True).loaded
    assert twice == called + 4 * sum(p.numel() for block in flow().network.blocks() for p in block.parameters())


def test_turns_are_measured_apart_whatever_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [measured(offload=("teacher",))]
    monkeypatch.setattr(module, "Counter", lambda turns: dict(reversed(Counter(turns).items())))
    found.append(measured(offload=("teacher",)))
    first, second = found
    assert list(first.passes) == list(reversed(second.passes))
    assert (first.loaded, first.calls, first.flops) == (second.loaded, second.calls, second.flops)
    assert peaks(first) == peaks(second)


@pytest.mark.parametrize(
    ("name", "sets", "machine"),
    [
        ("kd", [], {}),
        ("cosim", [], {"offload": ("teacher",)}),
        ("fmd", ["method.guidance=[1,2]"], {"checkpointing": True, "loss_pieces": 2}),
    ],
    ids=["kd", "cosim with an offloaded teacher", "fmd with guidance"],
)
def test_a_long_trajectory_is_measured_by_one_of_its_steps(
    name: str, sets: list[str], machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers of all of its steps."""
    forward, passes = FlowNetwork.forward, list[int]()
    monkeypatch.setattr(FlowNetwork, "forward", lambda self, *a, **more: passes.append(1) or forward(self, *a, **more))
    counts, found = [], []
    for steps, repeated in ((4, module.cached_passes), (30, module.cached_passes), (30, lambda *_: nullcontext())):
        monkeypatch.setattr(module, "cached_passes", repeated)
        passes.clear()
        found.append(measured(*sets, f"method.trajectory_steps={steps}", name=f"{name}/digits", **machine))
        counts.append(len(passes))
    assert counts[0] == counts[1] < counts[2] - 2 * 26
    short, one_step, all_steps = found
    for each in ("passes", "flops", "calls", "loaded"):
        assert getattr(one_step, each) == getattr(all_steps, each)
    assert one_step.flops > short.flops


def test_gradients_are_no_activations() -> None:
    """Of plain convolutions of many channels: at the end of a pass gradients are all there is, and what else there was
    grows with the images."""
    shape = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10, "model_channels": 64}
    plain = FlowNetwork(NETWORKS["song"](**shape, num_blocks=1, channel_mult=[1], attn_resolutions=[]), EDM())
    for role, turn in measure(load_recipe("sid/digits"), plain).passes.items():
        assert peak(turn.total, 0) == pytest.approx(turn.trained, rel=1e-4), role
        assert peak(turn.activations, 0) < turn.trained / 100, role


@pytest.mark.parametrize("pieces", [1, 2])
def test_two_sizes_determine_all_whichever_they_are(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (2, 6):
        monkeypatch.setattr(module, "ROWS", rows)
        found.append(peaks(measured(loss_pieces=pieces)))
    assert found[0] == found[1]


def test_pieces_are_planned_as_they_are_split() -> None:
    """The largest of unequal ones."""
    found = measured(loss_pieces=3)
    recipe, turn = found.recipe, found.passes["generator"]
    probe = Probe(recipe.method_class, recipe.method, found.networks, NoiseRange(0.5, 0.002, 80))
    probe.method.pieces = Pieces(3)
    for images in (3, 4, 8):
        (trace,) = (
            module._trace(probe, turn, images, effective_weights(probe.networks), [])
            for turn in probe.turns
            if turn.role == "generator"
        )
        assert peak(turn.total, images) == pytest.approx(max(trace.live), rel=1e-3)


def test_what_is_kept_is_counted_by_role_and_average() -> None:
    """Two averages of the generator, which has no second time; Adam's numbers by the betas of each role."""
    sets = ["ema.sigma_rel=[0.05]", "training.betas=[0,0.99]", "training.betas_by_role={auxiliary=[0.9,0.99]}"]
    found = measured(*sets, name="cosim/digits-paper")
    plan, networks = make_plan(found), found.networks
    assert plan.averages == 2 * plan.weights["generator"] < 2 * plan.weights["auxiliary"]
    trained = {role: numbers(networks[role]) - numbers(networks[role], "logvar") for role in ("generator", "auxiliary")}
    assert plan.gradients == {role: 4 * count for role, count in trained.items()}
    assert plan.optimizer == 4 * (trained["generator"] + 2 * trained["auxiliary"])
    assert plan.parameters == {role: numbers(network) for role, network in networks.items()}
    assert make_plan(found, Machine(offload=("ema",))).averages == 0
    assert make_plan(found, Machine(offload=("optimizer",))).optimizer == 0


def test_shards_are_of_the_large_networks_and_blocks_are_gathered() -> None:
    """A discriminator and its features are whole on each process. Two blocks are whole at a time, and a gradient."""
    found = measured("method.gan=1.0", "method.gan_channels=8", name="cosim/digits-paper")
    plain, sharded = make_plan(found), make_plan(found, Machine(shard=True), 4)
    for role in ("teacher", "generator", "auxiliary"):
        assert sharded.weights[role] == plain.weights[role] // 4
    for role in ("features", "discriminator"):
        assert sharded.weights[role] == plain.weights[role] > 0
    auxiliary = found.networks["auxiliary"]  # the largest
    assert isinstance(auxiliary, FlowNetwork)
    blocks = sorted(sum(p.numel() for p in block.parameters()) for block in auxiliary.network.blocks())
    assert sharded.gathered == 4 * (numbers(auxiliary) - sum(blocks) + blocks[-1] + blocks[-2] + blocks[-1])
    assert sharded.turn("generator", 8, accumulates=False) == sharded.turn("generator", 8)
    assert sharded.buckets == 0
    assert sharded.resident == sum(sharded.weights.values()) + sharded.averages + sharded.optimizer + sharded.gathered
