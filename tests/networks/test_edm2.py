"""What EDM2 has alone: weights that are normalized, folded and rounded, and the head for the loss's log variance."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import assert_rounded, depth

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.errors import EdmDistillError
from edmdistill.kernels.winograd import is_frozen
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.magnitude import EffectiveWeights, MPConv, scale_results

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
def test_folding_keeps_the_function(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.7)
    before = flow(x, t)
    flow.network.fold()
    folded = flow(x, t)
    assert_rounded(folded, before, depth(flow))
    for name, gain in flow.network.named_parameters():
        if name.endswith(("emb_gain", "out_gain")):
            gain.fill_(math.nan)  # it is in the weights, and read no more
    flow.network.fold()
    assert torch.equal(flow(x, t), folded)


@pytest.mark.parametrize("case", ["adm", "edm2"])
def test_folded_weights_are_laid_out_and_frozen_as_asked(make_flow: MakeFlow, case: str) -> None:
    """Those of 3x3, which Winograd's convolution takes."""
    for options, laid_out, frozen in (
        ({"lay_out": False}, False, False),
        ({"sample": False}, True, False),
        ({}, True, True),
    ):
        network = make_flow(case).network
        network.fold(**options)
        convolutions = [layer for layer in network.modules() if hasattr(layer, "frozen") and layer.weight is not None]
        for layer in convolutions:
            assert (layer.frozen is not None) == (frozen and layer.weight.shape[2:] == (3, 3))
            if layer.weight.shape[2:] == (3, 3):
                assert layer.weight.is_contiguous(memory_format=torch.channels_last) == laid_out
        assert is_frozen(network) == frozen
        assert not network.normalizes_weights
        if case == "edm2":
            assert not any(layer.weight.requires_grad for layer in convolutions)


@torch.no_grad()
def test_scaled_results_are_those_of_scaled_weights(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.7)
    before, weights = flow(x, t), copy.deepcopy(flow.state_dict())
    scale_results(flow.network)
    assert_rounded(flow(x, t), before, depth(flow))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in flow.state_dict().items())


def gradients(flow: FlowNetwork, passes: int, shared: bool) -> dict[str, torch.Tensor | None]:
    """Of a loss over several passes, which normalize the weights together or each for itself."""
    flow.zero_grad()
    torch.manual_seed(1)
    with EffectiveWeights(flow.network).shared() if shared else nullcontext():
        for _ in range(passes):
            flow(torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.2])).square().mean().backward()
    return {name: parameter.grad for name, parameter in flow.named_parameters()}


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_that_share_weights_have_the_same_gradient(make_flow: MakeFlow, passes: int) -> None:
    flow = make_flow("edm2", torch.float64).requires_grad_()
    flow.network.enc["8x8_conv"].weight.requires_grad_(False)
    flow.network.enc["8x8_block0"].emb_gain.requires_grad_(False)
    flow.network.out_conv.weight.data[0] = 0  # a norm of 0 has a gradient of 0
    alone, together = gradients(flow, passes, False), gradients(flow, passes, True)
    assert [name for name, gradient in alone.items() if gradient is None] == [
        name for name, gradient in together.items() if gradient is None
    ]
    assert {"network.logvar_linear.weight", "network.enc.8x8_conv.weight"} <= {
        name for name, gradient in together.items() if gradient is None
    }
    torch.testing.assert_close(
        {name: gradient for name, gradient in together.items() if gradient is not None},
        {name: gradient for name, gradient in alone.items() if gradient is not None},
    )


def test_shared_weights_of_convolutions_that_stand_still_have_the_dtype_of_activations(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2").requires_grad_(False)
    flow.network.out_conv.weight.requires_grad_()
    flow.compute_dtype = torch.bfloat16
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.7)
    expected = flow(x, t)
    with EffectiveWeights(flow.network, torch.bfloat16).shared():
        layers = [layer for layer in flow.modules() if isinstance(layer, MPConv)]
        kinds = {(layer.weight.ndim, layer.weight.requires_grad, layer.effective[0].dtype) for layer in layers}
        found = flow(x, t)
    assert kinds == {(4, False, torch.bfloat16), (2, False, torch.float32), (4, True, torch.float32)}
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_shared_weights_end_with_their_context(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    last, gain = flow.network.out_conv, flow.network.out_gain
    x, t, weights = torch.randn(2, 4, 8, 8), torch.tensor(0.7), EffectiveWeights(flow.network)
    before = flow(x, t)
    with weights.shared():
        last.weight.neg_()
        assert_rounded(flow(x, t), before, depth(flow))  # the weights as they were made
        arguments = torch.randn(1, 8, 8, 8), gain
        swapped = torch.func.functional_call(last, {"weight": last.weight.clone()}, arguments)
        assert_rounded(swapped, -last(*arguments), depth(last))  # another weight is used, such as that of now
    torch.testing.assert_close(flow(x, t), -before)
    with suppress(ZeroDivisionError), weights.shared():
        last.weight.neg_()
        raise ZeroDivisionError
    torch.testing.assert_close(flow(x, t), before)
    assert all(parameter.grad is None for parameter in flow.parameters()), "no loss was asked for its slopes"


def test_logvar_is_edm2s(make_flow: MakeFlow) -> None:
    assert Denoiser(make_flow("edm2")).logvar(torch.tensor([0.1, 5.0])).shape == (2, 1, 1, 1)
    assert Denoiser(make_flow("edm2")).logvar(torch.tensor(0.1)).shape == (1, 1, 1, 1)
    with pytest.raises(EdmDistillError, match="does not estimate the variance of its loss"):
        Denoiser(make_flow("ddpmpp")).logvar(torch.tensor(0.1))


@torch.no_grad()
def test_blocks_clip_their_results(make_flow: MakeFlow) -> None:
    """At 256 by default, which no small network reaches."""
    largest = []
    for limit in (256.0, 0.5, None):
        torch.manual_seed(0)
        flow = make_flow("edm2", clip_act=limit)
        found: list[float] = []
        for block in flow.network.blocks():
            block.register_forward_hook(lambda block, inputs, y, found=found: found.append(float(y.abs().max())))
        flow(torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution), torch.tensor(0.8))
        largest.append(max(found))
    assert largest[0] == largest[2] > 0.6
    assert largest[1] == 0.5
