"""The same network with other constructor arguments: how it comes to a second time, a head, or a weight of guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edmdistill.networks.base import Network
from edmdistill.networks.embeddings import GuidanceEmbedding
from edmdistill.networks.preconditioning import FlowNetwork, Preconditioning


def rebuild(
    flow: FlowNetwork, new: Mapping[str, Tensor], preconditioning: Preconditioning | None = None, **arguments: object
) -> FlowNetwork:
    """A copy of the network, made with these arguments in the place of its own.

    Args:
        new: tensors that it has not, by name; more than are needed may be given.
        preconditioning: None: as it is.
    Raises: KeyError: a tensor that is needed is in neither.
    """
    old = flow.network
    make: Callable[..., Network] = type(old)
    with torch.device("meta"):  # names and shapes alone: no random number is drawn
        network = make(**old.arguments | arguments)
    state, like = old.state_dict(), next(old.parameters())
    names = network.state_dict()
    tensors = {name: state[name].clone() if name in state else new[name].to(like, copy=True) for name in names}
    network.load_state_dict(tensors, assign=True)
    return FlowNetwork(network, preconditioning or flow.preconditioning, flow.compute_dtype).train(old.training)


def add_logvar(flow: FlowNetwork, seed: int, channels: int = 128) -> FlowNetwork:
    """A copy of the network with a head for u, as it is drawn by this seed; or with its own, if it has one.

    Args:
        channels: of the head's Fourier features; 128 is EDM2's.
    """
    if flow.network.logvar_linear is not None:
        return rebuild(flow, {})
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(seed)
        fourier, linear = flow.network.logvar_head(channels)
    assert fourier is not None
    assert linear is not None
    new = {f"logvar_fourier.{name}": tensor for name, tensor in fourier.state_dict().items()}
    new |= {f"logvar_linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    return rebuild(flow, new, logvar_channels=channels)


def add_guidance(flow: FlowNetwork) -> FlowNetwork:
    """A copy of the network that reads the weight of guidance as well, and whose output does not change by a bit."""
    new = GuidanceEmbedding(flow.network.emb_channels).state_dict(prefix="map_guidance.")
    return rebuild(flow, new, guided=True)
