"""Runs whose teacher is guided: by its classes or a network, at one weight or a range that the generator reads."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tolerance import assert_rounded, depth

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, describe
from edmdistill.checkpoints.layout import MODEL
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.planning.plan import make_plan, measure
from edmdistill.recipes.schema import Recipe
from edmdistill.sampling.generate import sample
from edmdistill.training.loop import rounds
from edmdistill.training.monitors import fingerprints
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train

NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
RANGE = {"guidance": [1.0, 2.0]}
BY_NETWORK = RANGE | {"guide": "network"}


def checkpoint(folder: Path, seed: int, label_dim: int = 10, resolution: int = 8, sigma_data: float = 0.5) -> Path:
    """A teacher of random weights."""
    torch.manual_seed(seed)
    network = new_network("edm2", resolution, 1, label_dim, logvar_channels=8, **NETWORK)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    flow = FlowNetwork(network, EDM(sigma_data=sigma_data))
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="it"), **describe(flow))
    save_checkpoint(folder, flow, config)
    return folder


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("guide") / "guide", seed=1)


def guided(recipe: Callable[..., Recipe], method: str = "scd", images: int = 24, **options: Any) -> Recipe:
    tables = json.loads(recipe(method, images=images).to_json())
    tables["method"] |= options
    return Recipe.from_json(json.dumps(tables).encode())


CPU = Machine("cpu")


@pytest.mark.parametrize("method", ["scd", "dscd"])
@pytest.mark.parametrize("offload", [(), ("teacher",)])
def test_three_rounds_by_another_network(recipe, teacher, guide, method, offload):
    """Every weight of the generator's own is learned, those of w too; the guide plays, and stays as it is."""
    made = guided(recipe, method, **BY_NETWORK)
    run = prepare(made, data="digits", teacher=teacher, guide=guide, machine=CPU._replace(offload=offload))
    assert run.unused("generator") == []
    assert list(run.describe()["roles"]) == ["teacher", "generator", "guide"]
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.2]), torch.eye(10)[:2]
    own = load_checkpoint(guide)[0]
    assert_rounded(run.networks["guide"](x, t, labels), own(x, t, labels), depth(own))
    before = fingerprints(run.networks)
    list(rounds(run))
    after = fingerprints(run.networks)
    assert {role for role in before if before[role] != after[role]} == {"generator"}
    assert run.networks["generator"].network.map_guidance.weight.abs().max() > 1e-3


def test_the_guide_counts(recipe, teacher, guide, tmp_path):
    """Another guide, other gradients; and one that is the teacher but for a last bit is no guidance, at any weight."""
    flow, config = load_checkpoint(teacher)
    with torch.no_grad():
        weight = next(flow.parameters()).view(-1)
        weight[0] = weight[0].nextafter(torch.tensor(2.0))
    save_checkpoint(tmp_path / "almost", flow, config)

    def norm(options: dict[str, Any], guide: Path | None) -> float:
        made = guided(recipe, images=8, **options)
        force = guide is None and "guidance" in options
        run = prepare(made, data="digits", teacher=teacher, guide=guide, machine=CPU, force_guidance=force)
        return next(rounds(run))["grad_norm/generator"]

    built_in = {"guidance": [2.0, 2.0], "guide": "network"}
    plain = norm({}, None)
    assert norm(built_in, tmp_path / "almost") == pytest.approx(plain, rel=1e-6)
    assert norm(built_in, guide) != pytest.approx(plain, rel=1e-3)
    assert norm({"guidance": [2.0, 2.0]}, None) != pytest.approx(plain, rel=1e-3)


def test_resumed_is_never_interrupted_and_by_the_same_guide(recipe, teacher, guide, tmp_path):
    made = guided(recipe, images=80, **BY_NETWORK)

    def start(guide: Path):
        return prepare(made, data="digits", teacher=teacher, guide=guide, machine=CPU)

    def interrupt(images: int, measures: object) -> None:
        if images == 24:
            signal.raise_signal(signal.SIGINT)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(start(guide), straight)
    assert train(start(guide), broken, on_round=interrupt) == (False, 24)
    with pytest.raises(TrainingError, match=r"guide_sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        train(start(checkpoint(tmp_path / "other", seed=2)), broken)
    assert train(start(guide), broken).finished
    files = ("generator/model.safetensors", "generator/config.json", "samples/000000080.png", "x0/000000080.png")
    for file in files:
        assert (straight / file).read_bytes() == (broken / file).read_bytes(), file


def test_the_generator_knows_its_guidance(recipe, teacher, guide, tmp_path):
    runs = {"a range": (BY_NETWORK, guide), "one weight": ({"guidance": [1.5, 1.5]}, None), "none": ({}, None)}
    for name, (options, source) in runs.items():
        made = guided(recipe, images=8, **options)
        force = source is None and "guidance" in options
        run = prepare(made, data="digits", teacher=teacher, guide=source, machine=CPU, force_guidance=force)
        train(run, tmp_path / name)
    ranged, one, none = (load_generator(tmp_path / name) for name in runs)
    assert ranged.config.guidance == Guidance("network", (1.0, 2.0))
    assert one.config.guidance == Guidance("classes", (1.5, 1.5))
    assert none.config.guidance is None
    assert [model.flow.guided for model in (ranged, one, none)] == [True, False, False]
    assert ranged.config.provenance.guide == hashlib.sha256((guide / MODEL).read_bytes()).hexdigest()
    assert one.config.provenance.guide is None
    torch.nn.init.normal_(ranged.flow.network.map_guidance.weight)
    assert not torch.equal(sample(ranged, seeds=[0], guidance=2.0), sample(ranged, seeds=[0]))


@pytest.mark.parametrize(
    ("method", "options", "asks", "sentence"),
    [
        (
            "scd",
            BY_NETWORK,
            False,
            "scd uses another network as guide in this recipe: name it with --guide",
        ),
        ("scd", RANGE, True, "--guide has no effect: .* leave it out, or add --set method.guide=network"),
        ("sid", {}, True, "--guide has no effect: .* of sid uses no guide; leave it out$"),
    ],
)
def test_a_guide_is_given_exactly_where_one_plays(recipe, teacher, guide, method, options, asks, sentence):
    made = guided(recipe, method, **options)
    with pytest.raises(TrainingError, match=sentence):
        prepare(made, data="digits", teacher=teacher, guide=guide if asks else None, machine=CPU)
    with pytest.raises(TrainingError, match=sentence):
        measure(made, load_checkpoint(teacher)[0], guide=load_checkpoint(guide)[0] if asks else None)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"label_dim": 3}, "the guide's label_dim is 3, but the teacher's is 10: choose a guide for the same data"),
        ({"resolution": 16}, "the guide's img_resolution is 16, but the teacher's is 8"),
        ({"sigma_data": 1.0}, r"the guide's sigma_data is 1.0, but the teacher's is 0.5"),
        ({"label_dim": 0}, None),
    ],
)
def test_a_guide_is_of_the_teachers_data(recipe, teacher, tmp_path, facts, sentence):
    other, made = checkpoint(tmp_path / "other", 1, **facts), guided(recipe, images=8, **BY_NETWORK)
    if sentence is None:  # one without classes stands for all of them
        assert next(rounds(prepare(made, data="digits", teacher=teacher, guide=other, machine=CPU)))
        return
    with pytest.raises(TrainingError, match=sentence):
        prepare(made, data="digits", teacher=teacher, guide=other, machine=CPU)


def test_a_guide_is_not_the_teacher(recipe, teacher):
    with pytest.raises(TrainingError, match=r"has the teacher's own weights, so it has no effect"):
        prepare(guided(recipe, **BY_NETWORK), data="digits", teacher=teacher, guide=teacher, machine=CPU)


def test_a_guide_works_on_the_teachers_latents(recipe, teacher, guide, tmp_path):
    flow, config = load_checkpoint(guide)
    made, encoder = guided(recipe, **BY_NETWORK), {"kind": "StabilityVAEEncoder", "scale": [1.0], "bias": [0.0]}
    save_checkpoint(tmp_path / "latent", flow, replace(config, encoder=encoder))
    with pytest.raises(TrainingError, match="uses other latents than the teacher"):
        prepare(made, data="digits", teacher=teacher, guide=tmp_path / "latent", machine=CPU)


def test_a_teacher_without_classes_cannot_be_guided_by_them(recipe, tmp_path):
    unlabeled = checkpoint(tmp_path / "unlabeled", 1, label_dim=0)
    with pytest.raises(TrainingError, match=r"this network has none: use --set method\.guide=network"):
        prepare(guided(recipe, **RANGE), data="digits", teacher=unlabeled, machine=CPU)


def test_the_plan_counts_the_guide(recipe, teacher, guide):
    flow, other = (load_checkpoint(source)[0] for source in (teacher, guide))
    plain = make_plan(measure(guided(recipe), flow))
    by_classes = make_plan(measure(guided(recipe, **RANGE), flow))
    by_network = make_plan(measure(guided(recipe, **BY_NETWORK), flow, guide=other))
    assert by_network.weights["guide"] == plain.weights["teacher"]
    assert "guide" not in by_classes.weights
    for plan in by_classes, by_network:  # one more pass of a network of the teacher's size, and the map of w
        assert plan.flops - plain.flops == pytest.approx(plain.forward_flops, rel=0.05)
    machine = Machine(offload=("teacher",))
    lent = make_plan(measure(guided(recipe, **BY_NETWORK), flow, machine, guide=other), machine)
    assert lent.weights["guide"] == lent.weights["teacher"] == 0
