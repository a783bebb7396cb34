"""Networks with fresh weights: F is 0 or nearly so, and other layers have the size that their class gives them."""

import math

import pytest
import torch
from torch import Tensor

from edmdistill.networks import NETWORKS, Network
from edmdistill.networks.base import Conditioning
from edmdistill.networks.initial import normal

SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4, "model_channels": 32}
CASES = {
    "song": SONG | {"embedding_type": "fourier", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2},
    "adm": SONG,
    "edm2": {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 64},
}


def test_they_are_normal_numbers() -> None:
    torch.manual_seed(0)
    numbers = normal(100, 100, std=3)
    torch.manual_seed(0)
    assert torch.equal(numbers, 3 * torch.randn(100, 100))


@pytest.mark.parametrize("positional", [False, True], ids=["c_noise", "t"])
@pytest.mark.parametrize("kind", CASES)
def test_an_outline_draws_nothing(kind: str, positional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch imports its compiler for this")

    for place, name in ((torch, "randn"), (torch, "rand"), (torch.Tensor, "normal_"), (torch.Tensor, "__mul__")):
        monkeypatch.setattr(place, name, draw)
    with torch.device("meta"):
        network = NETWORKS[kind](**CASES[kind], logvar_channels=8, positional_time=positional)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def fresh(kind: str, **arguments: object) -> Network:
    torch.manual_seed(0)
    return NETWORKS[kind](**{**CASES[kind], "channel_mult": [1, 2], "num_blocks": 1, **arguments})


def assert_uniform(weight: Tensor, bound: float, name: str) -> None:
    """Asserts that numbers fill [-bound, bound]: by the largest, and by the mean square, bound^2 / 3."""
    assert 0.9 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6), name
    deviations = math.sqrt(0.8 / weight.numel())  # of the mean square, relative
    assert float(weight.square().mean()) == pytest.approx(bound**2 / 3, rel=5 * deviations), name


@torch.no_grad()
@pytest.mark.parametrize("kind", CASES)
def test_a_fresh_network_returns_nothing_yet(kind: str) -> None:
    network = fresh(kind)
    F = network(torch.randn(2, 3, 8, 8), Conditioning(torch.tensor([-1.0, 0.3]), torch.eye(4)[:2]))
    assert isinstance(F, Tensor)
    assert float(F.abs().max()) <= (1e-3 if kind == "song" else 0)
    for name, gain in network.named_parameters():
        if name.endswith("gain"):
            assert gain == 0, name


def fans(weight: Tensor) -> tuple[int, int]:
    return weight[0].numel(), weight[:, 0].numel()


@torch.no_grad()
def test_songs_layers_start_as_xaviers() -> None:
    """Those that close a residual branch at 1e-5 of it, queries, keys and values at sqrt(.2). Biases are 0."""
    network = fresh("song", augment_dim=9, attn_resolutions=[8])
    gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
    seen = set()
    for name, parameter in network.named_parameters():
        layer, _, kind = name.rpartition(".")
        part = next((end for end in gains if layer.endswith(end)), "other")
        if kind == "bias":
            assert not parameter.any(), name
        elif parameter.ndim > 1:
            seen.add(part)
            assert_uniform(parameter, gains.get(part, 1.0) * math.sqrt(6 / sum(fans(parameter))), name)
    assert seen == {*gains, "other"}


@torch.no_grad()
def test_adms_layers_start_as_torchs() -> None:
    """Those that close a residual branch, and the augmentation's, at 0; the labels' normal."""
    network = fresh("adm", augment_dim=9, model_channels=64, attn_resolutions=[8])
    closing, seen = {"conv1", "proj", "out_conv", "map_augment"}, set()
    for name, parameter in network.named_parameters():
        part = name.split(".")[-2]
        if part in closing:
            seen.add(part)
            assert not parameter.any(), name
        elif part == "map_label":
            assert float(parameter.std()) == pytest.approx(1, rel=0.1)
        elif parameter.ndim > 1:
            assert_uniform(parameter, 1 / math.sqrt(fans(parameter)[0]), name)
    assert seen == closing


@torch.no_grad()
def test_edm2s_weights_start_normal() -> None:
    for name, parameter in fresh("edm2").named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.std()) == pytest.approx(1, rel=4 / math.sqrt(parameter.numel())), name
