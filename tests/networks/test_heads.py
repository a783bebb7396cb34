"""A network whose features are judged: F stays what it was, and the logits depend on the encoder alone."""

from collections.abc import Callable

import pytest
import torch

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.heads import ConvolutionHead, LevelHeads, MeanHead, add_head
from edmdistill.networks.levels import Layer

MakeFlow = Callable[..., FlowNetwork]


CASES = ["ddpmpp", "ncsnpp-ve", "song-skip", "adm", "edm2"]


@pytest.mark.parametrize("case", CASES)
def test_logits_come_from_the_encoder_and_leave_F_alone(make_flow: MakeFlow, case: str) -> None:
    flow = make_flow(case)
    size, layers = flow.img_resolution, flow.network.feature_layers
    x_t, t = torch.randn(2, flow.img_channels, size, size), torch.tensor([0.3, 1.2])
    plain = flow(x_t, t)
    for kind, count in {"bottleneck": 1, "levels": len(layers), "mean": layers[-1].resolution ** 2}.items():
        add_head(flow, kind, seed=1)
        flow.requires_grad_(True).zero_grad()
        F, logits = flow(x_t, t, logits="also")
        assert torch.equal(F, plain)
        assert torch.equal(flow(x_t, t), plain)
        alone = flow(x_t, t, logits="alone")
        assert torch.equal(alone, logits)
        assert logits.shape == (2, count)
        assert logits.dtype == torch.float32
        alone.square().sum().backward()
        idle = {name for name, parameter in flow.network.named_parameters() if parameter.grad is None}
        assert {name for name in idle if name.startswith(("enc.", "head."))} == set()
        assert {name for name, _ in flow.network.named_parameters() if name.startswith("dec.")} <= idle


@pytest.mark.parametrize("case", CASES)
def test_features_are_of_the_last_layer_of_each_level(make_flow: MakeFlow, case: str) -> None:
    flow, found = make_flow(case), {}
    for name, module in flow.network.enc.named_children():
        module.register_forward_hook(lambda module, inputs, result, name=name: found.update({name: result}))
    size, layers = flow.img_resolution, flow.network.feature_layers
    features = flow(torch.randn(2, flow.img_channels, size, size), torch.tensor([0.3, 1.2]), features=True)
    assert [len(feature) for feature in features] == [2] * len(layers)
    resolutions = [layer.resolution for layer in layers]
    assert resolutions == [size >> level for level in range(len(layers))]
    assert len(set(resolutions)) == len(layers) > 1
    for feature, layer in zip(features, layers, strict=True):
        assert feature.shape[1:] == (layer.out_channels, layer.resolution, layer.resolution)
        last = [name for name in found if name.startswith(f"{layer.resolution}x") and "_aux_" not in name][-1]
        assert last == layer.name
        assert torch.equal(feature, found[last])


@torch.no_grad()
@pytest.mark.parametrize("case", ["ddpmpp", "edm2"])
def test_features_are_computed_in_half_precision_and_judged_in_the_heads(make_flow: MakeFlow, case: str) -> None:
    flow = make_flow(case)
    add_head(flow, "levels", seed=1)
    size = flow.img_resolution
    point = torch.randn(2, flow.img_channels, size, size), torch.tensor([0.3, 1.2])
    flow.compute_dtype = torch.bfloat16
    features, (_, logits) = flow(*point, features=True), flow(*point, logits="also")
    for feature in features:
        assert feature.dtype == torch.float32
        assert torch.equal(feature, feature.bfloat16().float())
    assert logits.dtype == torch.float32
    assert torch.equal(flow(*point, logits="alone"), logits)
    assert torch.equal(flow.network.head(features), logits)


def layer(channels: int, resolution: int) -> Layer:
    return Layer(resolution, "block0", channels, channels, attention=False)


def test_the_head_is_dmd2s() -> None:
    """Its parameters in the official code for ImageNet at 64x64: a bottleneck of 768 channels, 8x8."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in ConvolutionHead([layer(768, 8)]).parameters()]
    block = [(768, 768, 4, 4), (768,), (768,), (768,)]
    assert shapes == [*block, *block, (1, 768, 1, 1), (1,)]
    head = ConvolutionHead([layer(768, 8)])
    kinds = [torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.SiLU]
    assert [type(part) for part in head] == [*kinds, *kinds, torch.nn.Conv2d, torch.nn.Flatten]
    assert [part.num_groups for part in head if isinstance(part, torch.nn.GroupNorm)] == [32, 32]
    for channels, groups in ((3, 1), (6, 1), (18, 3), (130, 26)):
        assert ConvolutionHead([layer(channels, 4)])[1].num_groups == groups, "of 4 channels or more each"
    for channels in (6, 18, 130):
        assert ConvolutionHead([layer(channels, 4)])([torch.randn(3, channels, 4, 4)]).shape == (3, 1)
    for resolution in (1, 2, 3, 4, 5, 12):
        assert ConvolutionHead([layer(8, resolution)])([torch.randn(3, 8, resolution, resolution)]).shape == (3, 1)


@torch.no_grad()
def test_every_level_has_a_head_of_its_own() -> None:
    heads = LevelHeads([layer(5, 8), layer(7, 4)])
    features = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 4, 4)]
    logits = heads(features)
    for level in (0, 1):
        others = [feature if own == level else feature + 1 for own, feature in enumerate(features)]
        changed = (heads(others) != logits).any(0)
        assert changed.tolist() == [level == 1, level == 0]


def test_a_mean_head_judges_each_pixel_of_the_bottleneck() -> None:
    features = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 4, 4)]
    torch.testing.assert_close(MeanHead()(features), features[1].mean(1).reshape(2, 16))


def test_a_seed_draws_the_head(make_flow: MakeFlow) -> None:
    """And nothing else; in float64, if the network is."""
    wide = make_flow("edm2", torch.float64)
    rng = torch.get_rng_state()
    add_head(wide, "bottleneck", 1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {parameter.dtype for parameter in wide.network.head.parameters()} == {torch.float64}
    flows = [make_flow("edm2") for _ in range(3)]
    for flow, seed in zip(flows, (1, 1, 2), strict=True):
        add_head(flow, "bottleneck", seed)
    first, same, other = (flow.network.head.state_dict()["0.weight"] for flow in flows)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
