"""The same network with other constructor arguments: how it comes to a second time, a head, or a weight of guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edmdistill.networks.base import Network
from edmdistill.networks.embeddings import GuidanceEmbedding
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import Preconditioning


def rebuild(
    flow: FlowNetwork, new: Mapping[str, Tensor], preconditioning: Preconditioning | None = None, **arguments: object
) -> FlowNetwork:
    """A copy of the network, made with these arguments in the place of its own.

    Args:
        new: tensors that it has not, or not in that shape, by name; more than are needed may be given.
        preconditioning: None: as it is.
    Raises: KeyError: a tensor that is needed is in neither.
    """
    old = flow.network
    make: Callable[..., Network] = type(old)
    with torch.device("meta"):  # names and shapes alone: no random number is drawn
        network = make(**old.arguments | arguments)
    state, like = old.state_dict(), next(old.parameters())
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    kept = {name: tensor for name, tensor in state.items() if tensor.shape == shapes.get(name)}
    tensors = {name: kept[name].clone() if name in kept else new[name].to(like, copy=True) for name in shapes}
    network.load_state_dict(tensors, assign=True)
    edm = preconditioning or flow.preconditioning
    return FlowNetwork(network, edm, flow.compute_dtype, flow.label_dropout).train(old.training)


def add_logvar(flow: FlowNetwork, seed: int, heads: int = 1, channels: int = 128) -> FlowNetwork:
    """A copy of the network with so many heads for u, or more: its own come first, those missing are of this seed.

    Args:
        channels: of Fourier features that the heads share, unless it has its own; 128 is EDM2's.
    """
    old = flow.network
    if old.logvar_linear is not None:
        if old.arguments["logvar_heads"] >= heads:
            return rebuild(flow, {})
        channels = old.arguments["logvar_channels"]
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(seed)
        fourier, linear = old.logvar_head(channels, heads)
    assert fourier is not None
    assert linear is not None
    new = {f"logvar_fourier.{name}": tensor for name, tensor in fourier.state_dict().items()}
    new |= {f"logvar_linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    for name, own in old.state_dict().items():
        if name.startswith("logvar_linear."):
            new[name][: len(own)] = own
    return rebuild(flow, new, logvar_channels=channels, logvar_heads=heads)


def add_guidance(flow: FlowNetwork) -> FlowNetwork:
    """Returns a copy of the network that also reads a weight of guidance; zeros are all that this adds to it."""
    new = GuidanceEmbedding(flow.network.emb_channels).state_dict(prefix="map_guidance.")
    return rebuild(flow, new, guided=True)
