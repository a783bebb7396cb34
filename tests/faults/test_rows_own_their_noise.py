"""What is random about a row depends on the run and the row: not on the micro-batch, the process or the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.draws import Draws
from edmdistill.machine.engine import Machine
from edmdistill.methods.tangents import finite_difference
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.song import SongUNet
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare

SMALL = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def random_flow(**arguments: object) -> FlowNetwork:
    """A network in float64 whose every part has an effect."""
    torch.manual_seed(0)
    network = UNet(8, 1, 10, logvar_channels=8, channels_per_head=8, **SMALL, **arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    return FlowNetwork(network, EDM()).double()


def measured(recipe: Recipe, teacher: Path, machine: Machine) -> list[dict[str, float]]:
    found = rounds(prepare(recipe, data="digits", teacher=teacher, machine=machine))
    return [{k: v for k, v in measures.items() if k.startswith(("loss", "grad_norm"))} for measures in found]


@pytest.mark.parametrize("method", ["scd", "cosim", "cosim, trajectories"])
def test_dropout_does_not_depend_on_the_micro_batch(
    method: str, recipe: Callable[..., Recipe], teacher: Path, tmp_path: Path
) -> None:
    """Losses and norms of gradients in float64, round after round; of two processes: tests/machine/test_engine.py."""
    flow, config = load_checkpoint(teacher)
    save_checkpoint(tmp_path / "wide", flow.double(), config)
    ways = Machine("cpu"), Machine("cpu", 4), Machine("cpu", 3), Machine("cpu", 2, checkpointing=True)
    made = recipe(method.partition(",")[0], images=16, dropout=0.3)
    if "," in method:
        made = replace(made, method=replace(made.method, trajectory_steps=3))
    expected, *others = (measured(made, tmp_path / "wide", way) for way in ways)
    for found in others:
        for measures, truth in zip(found, expected, strict=True):
            assert measures == pytest.approx(truth, rel=1e-9)


def inputs(rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.linspace(0.2, 1.4, rows).double(), torch.eye(10, dtype=torch.float64)[:rows]


def test_a_pass_without_gradient_has_the_dropout_of_the_next_with_it() -> None:
    flow = random_flow(dropout=0.3).train()
    x, t, labels = inputs()
    flow.draws = Draws(7, 6)
    with torch.no_grad():
        ahead = flow(x, t, labels)
    tangent = flow.tangent(x, t, labels, x, t)[0]
    flow.draws = Draws(7, 6)
    difference = finite_difference(flow, x, t, labels, x, t, (t,))[0]
    flow.draws = Draws(7, 6)
    learned = flow(x, t, labels, along=(x, t))[0]
    flow.draws = Draws(7, 6)
    first, second = flow(x, t, labels), flow(x, t, labels)
    for same in ahead, tangent, difference, learned:
        torch.testing.assert_close(same, first, rtol=1e-12, atol=1e-12)
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["edm2", "song"])
def test_a_row_has_its_dropout_in_any_batch(kind: str) -> None:
    x, t, labels = inputs()
    flow = random_flow(dropout=0.3)
    if kind == "song":
        torch.manual_seed(0)
        arguments = SMALL | {"dropout": 0.3, "label_dropout": 0.5}
        flow = FlowNetwork(SongUNet(8, 1, 1, label_dim=10, **arguments), EDM()).double()
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    flow.train()
    flow.draws = Draws(7, 6)
    whole = flow(x, t, labels)
    for rows in slice(0, 2), slice(2, 3), slice(3, 6):
        flow.draws = Draws(7, 6, rows)
        torch.testing.assert_close(flow(x[rows], t[rows], labels[rows]), whole[rows], rtol=1e-9, atol=1e-9)
    flow.draws = Draws(8, 6)
    assert (flow(x, t, labels) - whole).abs().max() > 0.01


def test_no_two_layers_share_a_mask() -> None:
    for network in random_flow().network, SongUNet(8, 1, 1, **SMALL):
        layers = [block.layer for block in network.blocks()]
        assert sorted(layers) == list(range(1, len(layers) + 1))


def test_without_draws_dropout_follows_torchs_seed() -> None:
    flow = random_flow(dropout=0.3).train()
    x, t, labels = inputs()
    outs = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        outs.append(flow(x, t, labels))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(flow.eval()(x, t, labels), flow(x, t, labels))
