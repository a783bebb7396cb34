"""What all networks share: numbered blocks, their dropout, the last layer, labels and times."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import silu

from edmdistill.draws import Draws
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time

MakeFlow = Callable[..., FlowNetwork]


def test_blocks_are_numbered_from_1(flow: FlowNetwork) -> None:
    """Each number is a piece of a row's random words; 0 is that of the labels."""
    blocks = flow.network.blocks()
    assert [block.layer for block in blocks] == list(range(1, len(blocks) + 1))


@torch.no_grad()
def test_every_block_has_dropout_of_its_own(make_flow: MakeFlow, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, keys, layers = make_flow(case, dropout=0.4).network, torch.tensor([5]), []

    def dropout(x: torch.Tensor, p: float, given: torch.Tensor, layer: int) -> torch.Tensor:
        assert p == 0.4
        assert given is keys
        layers.append(layer)
        return x

    for module in ("edm2", "unet_block"):
        monkeypatch.setattr(f"edmdistill.networks.{module}.dropout", dropout)
    size = network.img_resolution
    network(torch.randn(1, network.img_channels, size, size), Conditioning(torch.ones(1), dropout_keys=keys))
    assert layers == list(range(1, len(network.blocks()) + 1))


@torch.no_grad()
def test_the_last_layer_returns_f(make_flow: MakeFlow, case: str) -> None:
    network = make_flow(case).network
    found: list[torch.Tensor] = []
    network.last_layer.register_forward_hook(lambda layer, inputs, y: found.append(y))
    size = network.img_resolution
    F = network(torch.randn(1, network.img_channels, size, size), Conditioning(torch.tensor([0.3])))
    assert F.shape == found[0].shape
    assert torch.equal(F, found[0]) or case == "song-skip"  # it adds the images of lower resolutions


@pytest.mark.parametrize(("case", "eps"), [("ddpmpp", 1e-6), ("ncsnpp-ve", 1e-6), ("song-skip", 1e-6), ("adm", 1e-5)])
def test_norms_add_the_official_number_to_the_variance(make_flow: MakeFlow, case: str, eps: float) -> None:
    norms = [module for module in make_flow(case).network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize(("case", "first"), [("ddpmpp", 8), ("adm", 64), ("edm2", 16)])
def test_a_first_level_may_be_the_widest(make_flow: MakeFlow, case: str, first: int) -> None:
    """The official classes differ: the first convolution has channels of the model, or of the first level."""
    network = make_flow(case, channel_mult=[2, 1]).network
    assert network.enc["8x8_conv"].weight.shape[0] == first
    if case == "edm2":
        assert network.emb_noise.weight.shape == (16, 16)  # of the first level's channels, to the most of any
        network = make_flow(case, channel_mult=[2, 1], channel_mult_noise=1, channel_mult_emb=3).network
        assert network.emb_noise.weight.shape == (24, 8)


def test_a_row_keeps_its_label_or_loses_it(make_flow: MakeFlow) -> None:
    network = make_flow("edm2", label_dropout=0.3).network
    labels, like = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.5]]).expand(4000, 5), torch.zeros(1, dtype=torch.float64)
    found = network.drop_labels(Conditioning(like, labels, dropout_keys=Draws(0, 4000).dropout()), like)
    assert found.dtype == torch.float64
    kept = (found == labels).all(1)
    assert bool((kept | (found == 0).all(1)).all())
    assert float(kept.double().mean()) == pytest.approx(0.7, abs=0.03)
    whole = network.drop_labels(Conditioning(like, labels), like)
    assert torch.equal(whole, labels.double())


@torch.no_grad()
@pytest.mark.parametrize("case", ["ncsnpp-ve", "adm", "edm2"])
def test_labels_belong_to_the_first_time(make_flow: MakeFlow, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last nonlinearity, the second time adds the same whatever the labels: gain times its embedding."""
    network = add_second_time(make_flow(case, torch.float64)).network
    for module in ("song", "adm", "edm2"):
        monkeypatch.setattr(f"edmdistill.networks.{module}.silu", lambda x: x)
    c, second = torch.tensor([0.1, 0.5]).double(), torch.tensor([-0.3, 0.2]).double()
    for parameter in network.second_time.parameters():
        parameter.add_(torch.randn_like(parameter))
    network.second_time.gain.fill_(0.3)
    weight = 0.3 * getattr(network, "time_factor", 1.0)  # of both times, beside the labels
    expected = weight * network.embed_time(network.second_time, second)
    for labels in (None, torch.eye(5).double()[1:3]):
        added = network.embed(Conditioning(c, labels, second)) - network.embed(Conditioning(c, labels))
        torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("case", ["ncsnpp-ve", "adm"])
def test_split_times_lie_side_by_side(make_flow: MakeFlow, case: str) -> None:
    """Each after a nonlinearity of its own, the second's gain before it; without a second, it is the first."""
    flow = make_flow(case, torch.float64, two_time=True, split_times=True)
    network = flow.network
    network.second_time.gain.fill_(0.3)
    c, second = torch.tensor([0.1, 0.5]).double(), torch.tensor([-0.3]).double()
    plain = Conditioning(c, torch.eye(5).double()[1:3], second)
    early = network.early_embedding(plain)
    emb_t = network.finish_embedding(network.embed_time(network, c, early), plain)
    emb_s = silu(0.3 * network.embed_time(network.second_time, second, early)).expand_as(emb_t)
    torch.testing.assert_close(network.embed(plain), torch.cat([emb_t, emb_s], 1))
    alone, twice = (network.embed(plain._replace(c_noise_second=each)) for each in (None, c))
    assert torch.equal(alone, twice)
    assert not torch.allclose(alone, network.embed(plain))
    network(torch.randn(2, 3, 8, 8).double(), plain)  # whose blocks read both
