"""A network whose bottleneck is judged: F stays what it was, and the logits depend on the encoder alone."""

from collections.abc import Callable

import pytest
import torch

from edmdistill.networks.bottleneck import ConvolutionHead, add_head
from edmdistill.networks.flow import FlowNetwork

MakeFlow = Callable[..., FlowNetwork]


@pytest.mark.parametrize("kind", ["convolutions", "mean"])
@pytest.mark.parametrize("case", ["ddpmpp", "ncsnpp-ve", "song-skip", "adm", "edm2"])
def test_logits_come_from_the_encoder_and_leave_F_alone(make_flow: MakeFlow, case: str, kind: str) -> None:
    flow = make_flow(case)
    size, channels = flow.img_resolution, flow.img_channels
    x_t, t = torch.randn(2, channels, size, size), torch.tensor([0.3, 1.2])
    plain = flow(x_t, t)
    add_head(flow, kind, seed=1)
    flow.requires_grad_(True)
    F, logits = flow(x_t, t, logits="also")
    assert torch.equal(F, plain)
    assert torch.equal(flow(x_t, t), plain)
    alone = flow(x_t, t, logits="alone")
    assert torch.equal(alone, logits)
    shape = flow.network.bottleneck.resolution
    assert logits.shape == (2, 1 if kind == "convolutions" else shape**2)
    assert logits.dtype == torch.float32
    alone.square().sum().backward()
    idle = {name for name, parameter in flow.network.named_parameters() if parameter.grad is None}
    assert {name for name in idle if name.startswith(("enc.", "head."))} == set()
    assert {name for name, _ in flow.network.named_parameters() if name.startswith("dec.")} <= idle


def test_the_head_is_dmd2s() -> None:
    """Its parameters in the official code for ImageNet at 64x64: a bottleneck of 768 channels, 8x8."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in ConvolutionHead(768, 8).parameters()]
    block = [(768, 768, 4, 4), (768,), (768,), (768,)]
    assert shapes == [*block, *block, (1, 768, 1, 1), (1,)]
    for resolution in (1, 2, 3, 4, 5, 12):
        assert ConvolutionHead(8, resolution)(torch.randn(3, 8, resolution, resolution)).shape == (3, 1)


def test_a_seed_draws_the_head(make_flow: MakeFlow) -> None:
    flows = [make_flow("edm2") for _ in range(3)]
    for flow, seed in zip(flows, (1, 1, 2), strict=True):
        add_head(flow, "convolutions", seed)
    first, same, other = (flow.network.head.state_dict()["0.weight"] for flow in flows)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
