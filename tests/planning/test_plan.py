"""The plan against what a run of several networks really takes, and against published sizes."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from shared_probes import share_probes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine, split_rows
from edmdistill.machine.gpus import GPUS, find_gpu
from edmdistill.networks import NETWORKS, new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED
from edmdistill.planning.plan import Measurement, forward_flops, make_plan, measure, split_batch
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import Recipe
from edmdistill.schedules import _neighbors, _student_quantiles
from edmdistill.training.loop import rounds
from edmdistill.training.micro_batch import HEADROOM
from edmdistill.training.prepare import prepare

share_probes()

SHAPE = {"img_resolution": 8, "label_dim": 10}
SONG = SHAPE | {"in_channels": 1, "out_channels": 1, "num_blocks": 1, "channel_mult": [1, 2], "attn_resolutions": [4]}
SMALL = {
    "ddpmpp": ("song", SONG | {"model_channels": 32}),
    "adm": ("adm", SONG | {"model_channels": 32, "channel_mult": [1, 4]}),
    "edm2": (
        "edm2",
        SHAPE
        | {"img_channels": 1, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
        | {"attn_resolutions": [4], "channels_per_head": 32},
    ),
}


def network(kind: str, arguments: dict[str, object]) -> FlowNetwork:
    torch.manual_seed(0)
    return FlowNetwork(NETWORKS[kind](**arguments), EDM())


def cosim(batch: int) -> Recipe:
    sets = [f"training.batch={batch}", f"training.images={3 * batch}", "training.dropout=0.1"]
    return load_recipe("cosim/digits-paper", "cosim", sets)


@cache
def on_the_meta_device(name: str, machine: Machine) -> Measurement:
    """What CoSIM's turns take, which does not depend on the batch."""
    return measure(cosim(8), network(*SMALL[name]), machine)


def measured(recipe: Recipe, teacher: Path, machine: Machine) -> int:
    """The peak of a round, after the first: what was there before it, and what the profiler sees come and go."""
    run = prepare(recipe, data="digits", teacher=teacher, machine=machine)
    steps = rounds(run)
    next(steps)
    adam = [state for optimizer in run.optimizers.values() for state in optimizer.state.values()]
    networks = [*run.networks.values(), *(average.network for average in run.averages)]
    there: list[Tensor] = [value for state in adam for value in state.values()]
    there += [tensor for flow in networks for tensor in flow.state_dict().values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(steps)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in there)


@pytest.mark.parametrize(
    ("name", "batch", "micro_batch", "checkpointing", "pieces"),
    [
        pytest.param("ddpmpp", 32, 32, False, 1, marks=pytest.mark.slow),
        ("adm", 4, 4, False, 1),
        pytest.param("adm", 8, 2, False, 2, marks=pytest.mark.slow),
        pytest.param("edm2", 32, 32, False, 1, marks=pytest.mark.slow),
        pytest.param("edm2", 64, 64, False, 4, marks=pytest.mark.slow),
        ("edm2", 64, 64, True, 1),
    ],
)
def test_within_a_tenth_of_what_a_round_takes(
    name: str, batch: int, micro_batch: int, checkpointing: bool, pieces: int, tmp_path: Path
) -> None:
    flow, recipe = network(*SMALL[name]), cosim(batch)
    provenance = Provenance(source="a test")
    save_checkpoint(
        tmp_path / "teacher", flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow))
    )
    machine = Machine("cpu", micro_batch, checkpointing=checkpointing, loss_pieces=pieces)
    plan = make_plan(on_the_meta_device(name, Machine(checkpointing=checkpointing, loss_pieces=pieces)), machine)
    real = measured(recipe, tmp_path / "teacher", machine)
    assert plan.peak(micro_batch, accumulates=micro_batch < batch) == pytest.approx(real, rel=0.1)


def test_groups_stay_together(tmp_path: Path) -> None:
    """In a plan and its micro-batches, as those of IMM, whose loss lies between the images of a group."""
    flow, machine = network(*SMALL["edm2"]), Machine("cpu", 24)
    recipe = load_recipe("imm/digits", sets=["method.particles=8", "training.batch=48", "training.images=144"])
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="a test"), **describe(flow))
    save_checkpoint(tmp_path / "teacher", flow, config)
    plan = make_plan(measure(recipe, flow, machine), machine)
    assert plan.peak(24) == pytest.approx(measured(recipe, tmp_path / "teacher", machine), rel=0.1)
    assert split_batch(recipe, 4, None) == (16, 16)
    assert split_batch(recipe, 1, 23) == (48, 16)
    with pytest.raises(TrainingError, match="in groups of 8: use at least 8"):
        split_batch(recipe, 1, 7)
    for images, largest in ((24, 24), (23, 16)):
        assert plan.largest_micro_batch((plan.peak(images) + 1) / (1 - HEADROOM), 48) == largest
    assert plan.largest_micro_batch(plan.peak(8), 48) == 0


@pytest.mark.parametrize("group", [1, 3])
def test_micro_batches_are_planned_as_they_are_trained(group: int) -> None:
    """The largest of any process: of a batch of 12 in micro-batches of at most 7, it has 6."""
    sets = ["method.particles=3", "training.batch=48", "training.images=144"]
    recipe = load_recipe("sid/digits") if group == 1 else load_recipe("imm/digits", sets=sets)
    assert recipe.group_size == group
    for groups, processes, most in product(range(1, 14), range(1, 5), (None, *range(1, 15))):
        batch = groups * group
        changed = replace(recipe, training=replace(recipe.training, batch=batch))
        try:
            shares = [split_rows(batch, rank, processes, most, group) for rank in range(processes)]
        except TrainingError:
            with pytest.raises(TrainingError):
                split_batch(changed, processes, most)
            continue
        largest = max(piece.stop - piece.start for share in shares for piece in share)
        assert split_batch(changed, processes, most) == (max(s[-1].stop - s[0].start for s in shares), largest)


@pytest.mark.parametrize("name", ["tcm/digits", "ect/cifar10-ict"])
def test_constants_that_the_first_pass_makes_do_not_count(name: str) -> None:
    """Such as the quantiles that noise levels are drawn from."""
    for constants in _student_quantiles, _neighbors:
        constants.cache_clear()
    first, again = (make_plan(measure(load_recipe(name), network(*SMALL["edm2"]))) for _ in range(2))
    assert first.peaks(4) == again.peaks(4)


@pytest.mark.parametrize(
    ("name", "parameters", "forward"),
    [
        ("ddpmpp-cifar10", 55.7, 42.3),
        ("adm-imagenet64", 295.9, 219.3),
        ("edm2-img512-s", 280, 201.7),
        ("edm2-img512-m", 498, 357.5),
        ("edm2-img512-l", 777, 558.9),
        ("edm2-img512-xxl", 1523, 1093.7),
    ],
)
def test_published_sizes(name: str, parameters: float, forward: float) -> None:
    """Millions of parameters and GFLOP of a forward pass, to 0.3%; a multiplication and an addition are two."""
    kind, shape, arguments = PUBLISHED[name]
    with torch.device("meta"):
        flow = FlowNetwork(new_network(kind, *shape, **arguments), EDM())
    assert sum(p.numel() for p in flow.parameters()) / 1e6 == pytest.approx(parameters, rel=3e-3)
    assert forward_flops(flow) / 1e9 == pytest.approx(forward, rel=3e-3)


def test_where_things_are_kept() -> None:
    """CoSIM: three networks and an average, two of them trained with beta1 = 0."""
    flow = network(*SMALL["edm2"])
    one = sum(4 * p.numel() for p in flow.parameters())
    found = on_the_meta_device("edm2", Machine(checkpointing=False))
    plain, sharded, copied = make_plan(found), make_plan(found, Machine(shard=True), 4), make_plan(found, processes=2)
    assert sum(plain.weights.values()) == pytest.approx(3 * one, rel=0.02)
    assert (plain.averages, plain.optimizer) == (pytest.approx(one, rel=0.02), pytest.approx(2 * one, rel=0.02))
    rounded = make_plan(found, Machine(second_moment="bf16"))
    assert rounded.optimizer == plain.optimizer // 2
    assert plain.peak(3) - rounded.peak(3) == plain.optimizer // 2
    for name in ("averages", "optimizer"):
        assert getattr(sharded, name) == getattr(plain, name) // 4
    assert sharded.gradients == {role: size // 4 for role, size in plain.gradients.items()}
    assert sharded.gathered < one
    # DDP's buckets hold the gradients of both roles; those of several passes wait beside them.
    assert copied.buckets == sum(plain.gradients.values())
    assert copied.peak(3) == plain.peak(3) + copied.buckets
    assert 0.9 * one < copied.peak(3) - copied.peak(3, accumulates=False) < 1.1 * one
    most = max(sum(plain.turn(role, 3)[1:]) for role in plain.passes)
    assert [plain.graphs(3, count) for count in (1, 4)] == [most, 4 * most]
    machine = Machine(offload=("ema", "teacher", "optimizer"))
    spare = make_plan(measure(cosim(8), flow, machine), machine)
    assert (spare.averages, spare.optimizer, spare.weights["teacher"]) == (0, 0, 0)
    room = plain.peak(7) / (1 - HEADROOM)
    assert plain.largest_micro_batch(room + 1, 64) == 7
    assert plain.largest_micro_batch(room + 1, 5) == 5
    assert plain.largest_micro_batch(plain.peak(1), 64) == 0


@pytest.mark.parametrize("name", [pytest.param("ddpmpp", marks=pytest.mark.slow), "edm2"])
def test_a_teacher_in_the_hosts_memory(name: str) -> None:
    """What autograd holds for the way back through it stays until then: the weights themselves. Blocks that are
    computed again bring theirs again, one by one."""
    kind, arguments = SMALL[name]
    flow = network(kind, arguments | {"channel_mult": [1], "attn_resolutions": []})
    one = sum(4 * p.numel() for p in flow.parameters())

    def saved(checkpointing: bool) -> int:
        whole = Machine(checkpointing=checkpointing)
        lent = whole._replace(offload=("teacher",))
        peaks = (make_plan(measure(cosim(8), flow, machine), machine).peak(3) for machine in (whole, lent))
        return next(peaks) - next(peaks)

    assert saved(checkpointing=False) == pytest.approx(0, abs=0.3 * one)
    assert 0.5 * one < saved(checkpointing=True) < 1.01 * one


@pytest.mark.slow
def test_recipes_of_the_papers_fit_what_they_were_trained_on() -> None:
    """CoSIM's on 8 GPUs of 48 GB, 32 images a pass."""
    recipe, machine = load_recipe("cosim/imagenet512-l", "cosim"), Machine(checkpointing=True)
    kind, shape, arguments = PUBLISHED["edm2-img512-l"]
    with torch.device("meta"):
        flow = FlowNetwork(new_network(kind, *shape, **arguments), EDM())
    plan = make_plan(measure(recipe, flow, machine), machine, processes=8)
    assert plan.largest_micro_batch(GPUS["l40s"].memory, 256) >= 32


@pytest.mark.parametrize(
    ("name", "gib", "gpu"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000-ada"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA B200", 178.4, "b200"),
        ("Intel(R) Xeon(R) Processor", 23.5, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_memory(name: str, gib: float, gpu: str | None):
    assert find_gpu(name, gib * 2**30) == gpu
