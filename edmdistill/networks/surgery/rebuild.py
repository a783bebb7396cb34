"""Rebuilds a network with other constructor arguments: adds a second time, log variances, or a guidance weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edmdistill.networks.base import Network
from edmdistill.networks.embeddings import GuidanceEmbedding
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import Preconditioning
from edmdistill.torch_state import seeded

LOGVAR_CHANNELS = 128
"""Fourier features of a new head for log variances, as many as EDM2's."""


def rebuild(
    flow: FlowNetwork,
    new: Mapping[str, Tensor],
    preconditioning: Preconditioning | None = None,
    *,
    share: bool = False,
    **arguments: object,
) -> FlowNetwork:
    """Returns a copy of the network, with these arguments in place of its own.

    Args:
        new: tensors, by name, that it lacks or has in another shape; unused ones are ignored.
        preconditioning: None = unchanged.
        share: its weights are those of the network itself, and not copies.
    Raises: KeyError: a tensor is in neither.
    """
    old = flow.network
    make: Callable[..., Network] = type(old)
    with torch.device("meta"):  # names and shapes alone: no random number is drawn
        network = make(**old.arguments | arguments)
    state, like = old.state_dict(), next(old.parameters())
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    same = {name: tensor for name, tensor in state.items() if tensor.shape == shapes.get(name)}
    tensors = {
        name: (same[name] if share else same[name].clone()) if name in same else new[name].to(like, copy=True)
        for name in shapes
    }
    network.load_state_dict(tensors, assign=True)
    edm = preconditioning or flow.preconditioning
    return FlowNetwork(network, edm, flow.compute_dtype, flow.label_dropout).train(old.training)


def add_logvar(flow: FlowNetwork, seed: int, heads: int = 1) -> FlowNetwork:
    """Returns a copy of the network with at least so many heads for log variances; existing ones come first.

    Args:
        seed: of the new heads.
    """
    old, channels = flow.network, LOGVAR_CHANNELS
    if old.logvar_linear is not None:
        if old.arguments["logvar_heads"] >= heads:
            return rebuild(flow, {})
        channels = old.arguments["logvar_channels"]
    with seeded(seed):
        fourier, linear = old.logvar_head(channels, heads)
    assert fourier is not None
    assert linear is not None
    new = {f"logvar_fourier.{name}": tensor for name, tensor in fourier.state_dict().items()}
    new |= {f"logvar_linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    for name, tensor in old.state_dict().items():
        if name.startswith("logvar_linear."):
            new[name] = torch.cat([tensor, new[name][len(tensor) :].to(tensor)])
    return rebuild(flow, new, logvar_channels=channels, logvar_heads=heads)


def add_guidance(flow: FlowNetwork) -> FlowNetwork:
    """Returns a copy of the network that also reads a guidance weight, whose embedding is 0 at first."""
    new = GuidanceEmbedding(flow.network.emb_channels).state_dict(prefix="map_guidance.")
    return rebuild(flow, new, guided=True)
