"""A method's turns on the meta device, where tensors have shapes and no numbers, so that no network is too large."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange, Turn
from edmdistill.networks.flow import FlowNetwork
from edmdistill.training.meta import CachedShapes

ROWS = 2
"""Images of the pass that shows which parameters a loss reaches."""
LATE = 2**62
"""Images seen, so many that everything that starts during a run has started."""


class Probe:
    """A method over copies of its networks on the meta device.

    Args:
        networks: by role; only their shapes are copied.
    """

    def __init__(
        self,
        method: type[Method[Any]],
        config: msgspec.Struct,
        networks: Mapping[str, nn.Module],
        noise: NoiseRange,
    ) -> None:
        self.networks = {role: copy.deepcopy(network).to("meta") for role, network in networks.items()}
        self.product = self.networks[method.product]
        self.method, self.group_size = method(config, self.networks, noise), method.group_size(config)
        self.turns: tuple[Turn, ...] = self.method.turns()

    def set_trainable(self, role: str) -> nn.Module:
        """Puts the network of `role` in training mode, and freezes all others.  Returns: that network."""
        for name, network in self.networks.items():
            network.train(name == role).requires_grad_(name == role)
        return self.networks[role]

    def loss(self, turn: Turn, rows: int) -> Loss:
        """Returns the turn's loss on so many images."""
        network = self.product
        assert isinstance(network, FlowNetwork)
        shape = rows, network.img_channels, network.img_resolution, network.img_resolution
        labels = torch.empty(rows, network.label_dim, device="meta") if network.label_dim else None
        return turn.whole(Batch(torch.empty(shape, device="meta"), labels, LATE), Draws(0, rows, device="meta"))

    def unused(self) -> dict[str, set[str]]:
        """Returns the parameters of each trained role that no loss of its turns reaches."""
        unused: dict[str, set[str]] = {}
        for turn in dict.fromkeys(self.turns):
            network = self.set_trainable(turn.role)
            with CachedShapes():
                self.loss(turn, ROWS * self.group_size).value.sum().backward()  # type: ignore[no-untyped-call]
            idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
            unused[turn.role] = unused.get(turn.role, idle) & idle
            network.zero_grad(set_to_none=True)
        return unused
