import json
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from tolerance import assert_rounded, depth
from toy_runs import ALL_METHODS

from edmdistill.checkpoints.config import describe
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.errors import CheckpointError, DatasetError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.methods.tcm import TCMConfig
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.adapt import with_positional_time
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.roles import set_dropout
from edmdistill.training.run import Run
from edmdistill.training.session import train


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_role_starts_as_the_teacher(method, start):
    run = start(method)
    torch.manual_seed(0)
    x_t, t = torch.randn(4, 1, 8, 8), 1.2 + 0.3 * torch.rand(4)  # where all are for, TCM's generator too
    labels = torch.eye(10)[:4]
    flows = {role: network for role, network in run.networks.items() if METHODS[method].load().roles[role].make is None}
    outputs = [network(x_t, t, labels) for network in (*flows.values(), run.ema.network)]
    for output in outputs:  # the teacher's weights lie where the file has them, the others are copies
        assert_rounded(output, outputs[-1], depth(run.ema.network))
    for role, network in flows.items():
        assert network.two_time == METHODS[method].load().roles[role].two_time
    assert run.optimizers.keys() == {role for role, part in METHODS[method].load().roles.items() if part.trained}


def test_each_role_is_checked_once_however_many_turns_it_has(start):
    run = start("dmd2")
    assert [turn.role for turn in run.method.turns()] == ["auxiliary", "auxiliary", "generator"]
    assert run.unchecked == ["auxiliary", "generator"]


def test_roles_whose_turns_begin_later_are_checked_later(recipe, teacher):
    """A generator that learns alone at first is not left unchecked for its adversary, whose turn comes before."""
    tables = json.loads(recipe("ctm").to_json())
    tables["method"] |= {"gan_warmup_images": 8}
    run = prepare(Recipe.from_json(json.dumps(tables).encode()), data="digits", teacher=teacher, machine=Machine("cpu"))
    assert [turn.role for turn in run.method.turns()] == ["discriminator", "generator"]
    left = [list(run.unchecked), *(list(run.unchecked) for _ in rounds(run))]
    assert left[:3] == [["generator", "discriminator"], ["discriminator"], []]


def test_no_memory_is_shared_between_roles(start):
    run = start("cosim")
    networks = [*run.networks.values(), run.ema.network]
    addresses = [p.data_ptr() for network in networks for p in network.parameters()]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("kind", ["song", "adm", "edm2"])
def test_dropout_can_stay_where_features_are_small(kind):
    """In the blocks of 16x16 and 8x8, and not at all in those of 32x32, whatever the network had."""
    flow = FlowNetwork(new_network(kind, 32, 3, 0, model_channels=16, channel_mult=[1, 1, 1], dropout=0.5), EDM())

    def blocks() -> dict[str, float]:
        return {name: block.dropout for name, block in flow.named_modules() if hasattr(block, "dropout")}

    set_dropout(flow, 0.1, 16)
    small = {name for name, rate in blocks().items() if rate == 0.1}
    assert {rate for name, rate in blocks().items() if name not in small} == {0.0}
    assert small == {name for name in blocks() if ".16x16_" in name or ".8x8_" in name}
    set_dropout(flow, 0.2, None)
    assert set(blocks().values()) == {0.2}


def test_a_method_that_distils_asks_for_its_teacher(recipe):
    with pytest.raises(TrainingError, match=r"cosim needs a teacher: name its checkpoint, .* TEACHER \.\.\.$"):
        prepare(recipe("cosim"), data="digits")


def test_a_method_that_needs_none_makes_its_network(recipe):
    """One that reads t, where the method needs that; what is advised works."""
    bare = recipe("mean-flow").tables()
    bare["method"]["allow_edm_time"] = False
    made = {"kind": "edm2", "arguments": {"model_channels": 8, "channel_mult": [1], "num_blocks": 1}}
    for network, refused in (
        (None, r"mean-flow needs a teacher: .*, or let the recipe make its network, by a table \[network\]$"),
        (made, r"the recipe's network reads ln\(sigma\).*: set network\.arguments\.positional_time = true, or "),
    ):
        with pytest.raises(TrainingError, match=refused):
            prepare(Recipe.from_tables(bare | {"network": network}, "this"), data="digits")
    made["arguments"]["positional_time"] = True
    run = prepare(Recipe.from_tables(bare | {"network": made}, "this"), data="digits")
    assert run.config.stage == "generator"


def test_a_generator_is_no_teacher(start, recipe, tmp_path):
    train(start("sid"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="is a generator, made by sid"):
        prepare(recipe("cosim"), data="digits", teacher=tmp_path / "run")


def test_a_second_stage_goes_on_from_a_first(start, recipe, teacher, tmp_path):
    run = start("tcm")
    assert (run.config.stage, run.config.method) == ("generator", "tcm")
    train(run, tmp_path / "run")
    flow, config = load_flow(tmp_path / "run")
    assert flow.sigma_min == config.sigma_min == 1.0
    assert run.networks["teacher"].sigma_min == 0.002
    for source, found in ((teacher, "a teacher"), (tmp_path / "run", "a generator of tcm")):
        with pytest.raises(
            CheckpointError, match=f"{source} is {found}, not a first stage: train one by ect, sct, scd, dscd or"
        ):
            prepare(recipe("tcm"), data="digits", teacher=source)
    first = load_checkpoint(teacher.with_name("first-stage"))
    in_intervals = replace(first[1], method="scd", trained_sigmas=(80.0, 0.5))
    save_checkpoint(tmp_path / "intervals", first[0], in_intervals)
    with pytest.raises(CheckpointError, match=r"trained for 2 steps and does not jump .* --set method\.intervals=1"):
        prepare(recipe("tcm"), data="digits", teacher=tmp_path / "intervals")
    raised = replace(recipe("tcm"), method=TCMConfig(boundary=80.0))
    with pytest.raises(TrainingError, match="tcm trains from noise level 80 on, but the teacher's end at 80: lower it"):
        prepare(raised, data="digits", teacher=teacher.with_name("first-stage"))


def test_a_run_directory_is_a_teacher_and_a_place_to_start_from(start, recipe, tmp_path):
    trained = start("diffusion")
    train(trained, tmp_path / "run")
    for method in ("diffusion", "sid"):
        run = prepare(recipe(method), data="digits", teacher=tmp_path / "run", machine=Machine("cpu"))
        expected = trained.ema.network.network.out_gain
        assert torch.equal(run.ema.network.network.out_gain, expected)


def test_data_must_fit_the_network(recipe, tmp_path):
    tables = json.loads(recipe("diffusion").to_json())
    tables["network"]["arguments"] |= {"img_resolution": 16, "label_dim": 3}
    has = "digits are images of 8x8 with 1 channel and 10 classes, but the network takes images of 16x16 with 1 channel"
    with pytest.raises(DatasetError, match=has):
        prepare(Recipe.from_json(json.dumps(tables).encode()), data="digits")
    with pytest.raises(DatasetError):
        prepare(recipe("diffusion"), data=tmp_path / "nothing")


def test_the_plan_is_plain(start):
    plan = json.loads(json.dumps(start("cosim").describe()))
    assert plan["schema_version"] == 1
    assert {role: part["trained"] for role, part in plan["roles"].items()} == {
        "teacher": False,
        "generator": True,
        "auxiliary": True,
    }
    assert plan["roles"]["auxiliary"]["parameters"] > plan["roles"]["generator"]["parameters"] > 1000
    assert plan["data"]["images"] == 1500
    assert Recipe.from_json(json.dumps(plan["recipe"]).encode()).hash == plan["recipe_hash"]


def test_a_teacher_that_makes_the_tangent_unstable_is_refused(recipe, teacher):
    tables = json.loads(recipe("scd").to_json())
    del tables["method"]["allow_edm_time"]
    with pytest.raises(TrainingError, match="convert the teacher with --time-embedding positional and fine-tune it"):
        prepare(Recipe.from_json(json.dumps(tables).encode()), data="digits", teacher=teacher, machine=Machine("cpu"))


def test_allowing_such_teachers_does_nothing_for_others(recipe, teacher, tmp_path):
    flow, config = load_checkpoint(teacher)
    flow = with_positional_time(flow)
    save_checkpoint(tmp_path / "positional", flow, replace(config, **describe(flow)))
    with pytest.raises(TrainingError, match=r"allow_edm_time has no effect: leave out method\.allow_edm_time"):
        prepare(recipe("scd"), data="digits", teacher=tmp_path / "positional", machine=Machine("cpu"))


SONG = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "positional_time": True}


@pytest.mark.parametrize("weighting", ["none", "adaptive"])
def test_a_role_with_logvar_has_a_head_which_learns_where_it_is_asked(recipe, weighting):
    tables = json.loads(recipe("diffusion").to_json())
    tables["network"] |= {"kind": "song", "arguments": SONG}
    tables["method"]["weighting"] = weighting
    made = Recipe.from_json(json.dumps(tables).encode())
    runs = [prepare(made, data="digits", machine=Machine("cpu")) for _ in range(2)]
    heads = [run.networks["teacher"].network.get_buffer("logvar_fourier.freqs") for run in runs]
    assert torch.equal(*heads)
    idle = {name for name in runs[0].unused("teacher") if "logvar" in name}
    assert len(idle) == (2 if weighting == "none" else 0)
    assert runs[0].config.c_noise == "t"


def test_intervals_that_are_no_multiple_of_the_batch_end_at_the_round_that_crosses_them():
    training = SimpleNamespace(batch=8)
    rounds = [SimpleNamespace(images=images, recipe=SimpleNamespace(training=training)) for images in range(8, 65, 8)]
    assert [run.images for run in rounds if Run.due(run, 20)] == [24, 40, 64]
    assert [run.images for run in rounds if Run.due(run, 16)] == [16, 32, 48, 64]
