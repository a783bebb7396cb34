"""A method's turns on the meta device, where tensors have shapes and no numbers, so that no network is too large."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.errors import TrainingError
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange, Turn
from edmdistill.networks.flow import FlowNetwork
from edmdistill.training.meta import CachedShapes, cached_passes

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
        """Returns the turn's loss on so many images.  Raises: TrainingError: it is none; see `require_loss`."""
        network = self.product
        assert isinstance(network, FlowNetwork)
        shape = rows, network.img_channels, network.img_resolution, network.img_resolution
        labels = torch.empty(rows, network.label_dim, device="meta") if network.label_dim else None
        draws = Draws(0, rows, device="meta")
        player = self.networks[turn.role]
        if isinstance(player, FlowNetwork):
            player.draws = draws  # of dropout, as in training
        loss = turn.whole(Batch(torch.empty(shape, device="meta"), labels, LATE), draws)
        require_loss(loss, rows, f"{type(self.method).__name__}, the turn of {turn.role}")
        return loss

    def unused(self) -> dict[str, set[str]]:
        """Returns the parameters of each trained role that no loss of its turns reaches."""
        unused: dict[str, set[str]] = {}
        for turn in dict.fromkeys(self.turns):
            network = self.set_trainable(turn.role)
            with CachedShapes(), cached_passes(self.networks.values()):
                self.loss(turn, ROWS * self.group_size).value.sum().backward()  # type: ignore[no-untyped-call]
            idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
            unused[turn.role] = unused.get(turn.role, idle) & idle
            network.zero_grad(set_to_none=True)
        return unused


def require_loss(loss: object, rows: int, where: str) -> None:
    """Checks what a method's turn has returned for so many images.

    Raises: TrainingError: it is no Loss, or a part of it has another shape than the Loss says, or no gradient.
    """
    if not isinstance(loss, Loss):
        raise TrainingError(f"{where}: the loss is a {type(loss).__name__}: return a Loss of value, t and signals")
    parts = {"value": (loss.value, [rows]), "t": (loss.t, [rows])}
    parts |= {f"signals[{name!r}]": (signal, []) for name, signal in loss.signals.items()}
    for name, (part, shape) in parts.items():
        if not isinstance(part, Tensor) or list(part.shape) != shape:
            given = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            what = "a mean over the samples, a tensor of no dimension" if not shape else "a number for each sample"
            raise TrainingError(f"{where}: {name} of {rows} samples is {given}, but must be {what}")
    if not loss.value.requires_grad:
        raise TrainingError(f"{where}: the loss does not depend on the network that it trains, or is detached from it")
