"""Frozen networks whose weights stay in the host's memory: each layer's are on the device only while it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edmdistill.networks.base import Network
from edmdistill.transfer import host_block


def offload(network: Network, device: torch.device) -> None:
    """Moves the weights and buffers of a network to the host; every layer gets a copy of its own to compute with.

    The copies are queued beside the computation: the host does not wait for them. Between two calls, weights are on the
    meta device. Where gradients flow through to the input, autograd keeps the weights on the device until the backward
    pass, except in checkpointed blocks: without checkpointing, nothing is saved there.
    """
    network.execution_device = device
    modules = [module for module in network.modules() if _tensors(module)]
    tensors = [tensor for module in modules for tensor in _tensors(module).values()]
    kept = host_block(tensors, device)
    for copy, tensor in zip(kept, tensors, strict=True):
        copy.copy_(tensor.detach())
    copies = iter(kept)
    for module in modules:
        held = {name: next(copies) for name in _tensors(module)}
        module.forward = partial(_with_weights, module, module.forward, held, device)
        _place(module, {name: copy.to("meta") for name, copy in held.items()})


def _with_weights(
    module: nn.Module,
    forward: Callable[..., Any],
    held: dict[str, Tensor],
    device: torch.device,
    *args: Any,
    **more: Any,
) -> Any:
    before = _tensors(module)
    _place(module, {name: copy.to(device, non_blocking=True) for name, copy in held.items()})
    try:
        return forward(*args, **more)
    finally:
        _place(module, before)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's own parameters and buffers, without those of its parts."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _place(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
