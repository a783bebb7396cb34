"""What EDM2 has alone: weights that are normalized, folded and rounded, and the head for the loss's log variance."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.networks.edm2 import MPConv
from edmdistill.networks.flow import Denoiser, FlowNetwork

MakeFlow = Callable[..., FlowNetwork]


@torch.no_grad()
def test_two_official_training_forwards(golden: Path) -> None:
    """The official forward, when it trains, is after_step and then forward."""
    flow, _ = build_official(read_official(golden / "edm2-latent-gnet-cond.pkl.gz"), upcast=True)
    denoiser, expected = Denoiser(flow), load_file(golden / "edm2-train-mode.safetensors")
    for call in ("first", "second"):
        flow.network.after_step()
        found = denoiser(expected["x"], expected["sigma"], expected["labels"])
        torch.testing.assert_close(found, expected[f"D_x_{call}"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(denoiser.logvar(expected["sigma"]), expected[f"logvar_{call}"])
    weights = flow.network.state_dict()
    for name, value in expected.items():
        if name.startswith("after_two_forwards."):
            own = name.removeprefix("after_two_forwards.").removeprefix("unet.")
            torch.testing.assert_close(weights[own], value)


@torch.no_grad()
def test_after_step_keeps_the_function(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2", torch.float64)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.7)
    before = flow(x, t)
    flow.network.after_step()
    for layer in flow.modules():
        if isinstance(layer, MPConv):
            assert layer.weight.square().mean() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(flow(x, t), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folding_keeps_the_function_to_the_bit(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.7)
    before = flow(x, t)
    flow.network.fold()
    assert torch.equal(flow(x, t), before)
    for name, gain in flow.network.named_parameters():
        if name.endswith(("emb_gain", "out_gain")):
            gain.fill_(math.nan)  # it is in the weights, and read no more
    flow.network.fold()
    assert torch.equal(flow(x, t), before)


def test_logvar_is_edm2s(make_flow: MakeFlow) -> None:
    assert Denoiser(make_flow("edm2")).logvar(torch.tensor([0.1, 5.0])).shape == (2, 1, 1, 1)
    assert Denoiser(make_flow("edm2")).logvar(torch.tensor(0.1)).shape == (1, 1, 1, 1)
    with pytest.raises(NotImplementedError, match="SongUNet has no head"):
        Denoiser(make_flow("ddpmpp")).logvar(torch.tensor(0.1))
