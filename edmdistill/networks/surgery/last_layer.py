"""Gradients of several losses with respect to the last layer's weight, by which a method balances them.

They are computed from the layer's inputs and outputs, so the network's own gradients do not change, and its weights may
be wrapped or sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edmdistill.kernels.dual import value


class LayerCall(NamedTuple):
    """Arguments and result of a layer, and its tensors, which a sharded layer has only during the call."""

    arguments: tuple[Tensor, ...]
    out: Tensor
    tensors: dict[str, Tensor]


class LastLayer:
    """A layer with a weight, and the calls recorded while it is watched."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls: list[LayerCall] = []

    def gradient(self, loss: Tensor) -> Tensor:
        """Returns d loss / d weight of a scalar loss of the layer's results; keeps the graph of the loss.  [numel]

        Of n results in fp16, slopes of a mean are about 1/n, which underflows, and the weight has n times that of the
        loss times sqrt(n), which does not overflow either.
        """
        outs = [call.out for call in self.calls]
        scale = 2.0 ** round(math.log2(max(out.numel() for out in outs)) / 2)
        slopes = torch.autograd.grad(loss * scale, outs, retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(self.calls[0].tensors["weight"])
        for call, slope in zip(self.calls, slopes, strict=True):
            if slope is not None:
                weight = call.tensors["weight"].detach().requires_grad_()
                out = torch.func.functional_call(self.layer, call.tensors | {"weight": weight}, call.arguments)
                gradient += torch.autograd.grad(out, weight, slope)[0]
        return gradient.flatten() / scale


@contextmanager
def watched(layer: nn.Module) -> Iterator[LastLayer]:
    """Records the calls of the layer that have a gradient while the context is open."""
    last = LastLayer(layer)

    def record(module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        if not torch.is_grad_enabled():
            return
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        last.calls.append(LayerCall(tuple(value(argument).detach() for argument in arguments), value(out), tensors))

    handle = layer.register_forward_hook(record)
    try:
        yield last
    finally:
        handle.remove()
