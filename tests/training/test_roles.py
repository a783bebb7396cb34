"""The networks of a method's roles."""

import copy

import pytest
import torch
from toy_runs import TABLES

from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.rebuild import rebuild
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.roles import build_roles
from edmdistill.training.session import train


def test_the_auxiliary_score_reads_t_by_the_recipes_gain(teacher) -> None:
    """Also from a teacher that was converted with a second time, whose gain is 0."""
    flow = load_checkpoint(teacher)[0]
    for source in (flow, add_second_time(flow)):
        for gain in (0.0, 0.5):
            recipe = Recipe.from_tables(TABLES | {"method": {"name": "cosim", "t_gain": gain}}, "a test")
            networks = build_roles(recipe, source)
            assert networks["auxiliary"].network.second_time.gain == gain
            assert not networks["generator"].two_time


@pytest.mark.parametrize("method", ["fmd", "ctm"])
def test_the_generator_reads_s_by_the_recipes_gain_or_by_one_it_has_learned(teacher, method) -> None:
    flow = load_checkpoint(teacher)[0]
    options = {"name": method, "s_gain": 0.5} | ({"gan": 0.0} if method == "ctm" else {})
    recipe = Recipe.from_tables(TABLES | {"method": options}, "a test")
    trained = add_second_time(flow)
    trained.network.second_time.gain.data.fill_(0.25)
    for init, gain in ((None, 0.5), (flow, 0.5), (trained, 0.25)):
        networks = build_roles(recipe, flow, init=init)
        gains = {float(network.network.second_time.gain) for name, network in networks.items() if name != "teacher"}
        assert gains == {gain}


def test_labels_are_dropped_only_where_no_other_network_reads_them(teacher) -> None:
    """A network that was trained for guidance keeps its label dropout when it learns from data alone."""
    flow = load_checkpoint(teacher)[0]
    flow = rebuild(flow, {}, label_dropout=0.1)
    flow.label_dropout = 0.1
    alone = {"diffusion", "ect", "imm", "mean-flow", "sct"}
    for method in METHODS:
        tables = TABLES | {"method": {"name": method} | ({"gan": 0.0} if method == "ctm" else {})}
        tables |= {"network": {"kind": "edm2"}} if method == "diffusion" else {}
        for role, network in build_roles(Recipe.from_tables(tables, "a test"), flow).items():
            if role != "teacher" and isinstance(network, FlowNetwork):
                inner = network.network
                dropout = {network.label_dropout, inner.label_dropout, inner.arguments["label_dropout"]}
                assert dropout == {0.1 if method in alone else 0.0}, (method, role)
    assert flow.network.arguments["label_dropout"] == 0.1


SMALL = {"img_resolution": 8, "label_dim": 10, "model_channels": 16, "num_blocks": 1, "attn_resolutions": [8]}
EDM_SMALL = SMALL | {"in_channels": 1, "out_channels": 1, "channel_mult": [1, 2]}
KINDS = {
    "song": EDM_SMALL,
    "edm2": SMALL | {"img_channels": 1, "channel_mult": [1, 2], "channels_per_head": 8},
}


@pytest.mark.parametrize(("kind", "precision"), [("song", "bf16"), ("edm2", "bf16")])
def test_a_frozen_teacher_keeps_half_of_its_bytes_and_all_bits_of_its_results(kind, precision) -> None:
    torch.manual_seed(0)
    flow = FlowNetwork(NETWORKS[kind](**KINDS[kind]), EDM())
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tables = TABLES | {"method": {"name": "sid"}}
    tables |= {"training": TABLES["training"] | {"precision": precision}}
    teacher = build_roles(Recipe.from_tables(tables, "a test"), flow)["teacher"]
    convolutions = [parameter for parameter in teacher.parameters() if parameter.ndim == 4]
    assert {parameter.dtype for parameter in convolutions} == {teacher.compute_dtype}
    assert sum(p.nbytes for p in teacher.parameters()) < 0.7 * sum(p.nbytes for p in flow.parameters())

    wide = copy.deepcopy(flow).requires_grad_(False).eval()
    wide.network.fold()
    wide.compute_dtype = teacher.compute_dtype
    x, t = torch.randn(3, 1, 8, 8, requires_grad=True), torch.tensor([0.2, 0.8, 1.5])
    labels, dx = torch.eye(10)[:3], torch.randn(3, 1, 8, 8)
    for of in (
        lambda network: network(x, t, labels),
        lambda network: torch.autograd.grad(network(x, t, labels).square().sum(), x)[0],
        lambda network: network.tangent(x, t, labels, dx, torch.ones(3))[1],
    ):
        assert torch.equal(of(teacher), of(wide))


def test_augmentation_needs_a_network_conditioned_on_it(teacher) -> None:
    recipe = Recipe.from_tables(TABLES | {"method": {"name": "sid", "augment": 0.1}}, "a test")
    with pytest.raises(
        TrainingError, match=r"with augment_dim = 9, but this one has 0: .* set network.arguments.augment_dim = 9"
    ):
        build_roles(recipe, load_checkpoint(teacher)[0])


@pytest.mark.parametrize("method", ["diffusion", "mean-flow"])
def test_a_network_of_the_runs_own_learns_from_augmented_images(method, tmp_path) -> None:
    """By mean-flow through exact tangents, too."""
    arguments = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "augment_dim": 6}
    options = {"name": method, "augment": 0.9, "augmentations": ["xflip", "scale", "anisotropy", "translation"]}
    tables = {"network": {"kind": "song", "arguments": arguments | {"positional_time": True}}, "method": options}
    recipe = Recipe.from_tables(TABLES | tables, "a test")
    run = prepare(recipe, data="digits", machine=Machine(device="cpu"))
    before = run.ema.network.network.map_augment.weight.clone()
    train(run, tmp_path, on_message=lambda sentence: None)
    after = load_checkpoint(tmp_path / "generator")[0].network
    assert (after.map_augment.weight != before).any(0).all()  # every label, the mirror's as well
