"""Activations computed again give the same numbers, bit for bit, and hold less memory."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from edmdistill.networks.adm import DhariwalUNet
from edmdistill.networks.base import Conditioning, Network
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.song import SongUNet


def make(kind: str) -> Network:
    torch.manual_seed(0)
    shape = {"img_resolution": 8, "label_dim": 3}
    small = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [4], "dropout": 0.2}
    network: Network
    if kind == "edm2":
        network = UNet(**shape, img_channels=2, channels_per_head=32, **small)
    elif kind == "song":
        network = SongUNet(**shape, in_channels=2, out_channels=2, **small)
    else:
        network = DhariwalUNet(**shape, in_channels=2, out_channels=2, **small)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # what starts at 0 would hide what is behind it
                parameter.fill_(0.1)
    return network


def gradients(network: Network, frozen: bool) -> tuple[list[Tensor | None], int]:
    """Of the input and all parameters; and how many bytes the forward pass kept."""
    torch.manual_seed(1)
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if tensor.data_ptr() not in own else 0
        return tensor

    network.train().requires_grad_(not frozen)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        labels = torch.eye(3)[[0, 1, 2, 0]]
        out = network(x, Conditioning(torch.linspace(-1, 1, 4), labels, dropout_keys=torch.arange(4)))
    out.square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in network.parameters())]
    network.zero_grad(set_to_none=True)
    return found, kept


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["edm2", "song", "adm"])
def test_checkpointed_blocks(kind: str, frozen: bool) -> None:
    network = make(kind)
    names = list(network.state_dict())
    plain, kept = gradients(network, frozen)
    network.checkpoint_blocks()
    again, less = gradients(network, frozen)
    assert list(network.state_dict()) == names
    assert plain[0] is not None
    assert plain[0].any()
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    assert less < kept / 3


@pytest.mark.parametrize("kind", ["edm2", "song", "adm"])
def test_a_block_is_computed_again_to_its_end(kind: str) -> None:
    """Offloading and sharding release the weights of a layer after its call."""
    network, calls = make(kind), Counter[str]()
    for name, layer in network.named_modules():
        if hasattr(layer, "frozen") and layer.weight is not None and ".conv" in name:
            layer.register_forward_hook(lambda layer, inputs, y, name=name: calls.update([name]))
    network.checkpoint_blocks()
    gradients(network, frozen=False)
    assert set(calls.values()) == {2}
