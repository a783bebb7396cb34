"""The gradients of several losses in the weights of a network's last layer, by which a method balances them.

They are computed from what goes into the layer and what comes out of it: the network's own gradients stay as they are,
and where its weights are wrapped or sharded, nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerCall(NamedTuple):
    """Of a layer: what it was given and what it gave, and its tensors then, which a shard has only for that time."""

    arguments: tuple[Tensor, ...]
    out: Tensor
    tensors: dict[str, Tensor]


class LastLayer:
    """A layer with a weight, and its calls while it is watched."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls: list[LayerCall] = []

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d weight, for a 0-dim loss of what the layer gave; the graph of the loss stays.  [numel]"""
        slopes = torch.autograd.grad(loss, [call.out for call in self.calls], retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(self.calls[0].tensors["weight"])
        for call, slope in zip(self.calls, slopes, strict=True):
            if slope is not None:
                weight = call.tensors["weight"].detach().requires_grad_()
                with torch.enable_grad():
                    out = torch.func.functional_call(self.layer, call.tensors | {"weight": weight}, call.arguments)
                gradient += torch.autograd.grad(out, weight, slope)[0]
        return gradient.flatten()


@contextmanager
def watched(layer: nn.Module) -> Iterator[LastLayer]:
    """Within it, the layer remembers its calls."""
    own = LastLayer(layer)

    def remember(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        own.calls.append(LayerCall(tuple(argument.detach() for argument in arguments), out, tensors))

    handle = layer.register_forward_hook(remember)
    try:
        yield own
    finally:
        handle.remove()
