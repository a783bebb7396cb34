"""What says that a run is ill, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from edmdistill.errors import TrainingError
from edmdistill.methods.base import Loss
from edmdistill.trigflow import time_to_sigma


class Diverged(TrainingError):
    """A loss, a gradient or a weight is no longer a number."""


def diverged(turn: str, loss: Loss, networks: Mapping[str, nn.Module], images: int, sigma_data: float) -> Diverged:
    """The error that says where a turn went wrong, after its backward pass and before its step.

    Args:
        turn: the role that is trained.
        loss: of that turn.
        networks: all roles.
    """
    bad = ~loss.value.detach().isfinite()
    if bad.any():
        sigma = time_to_sigma(loss.t.detach()[bad], sigma_data)
        what = f"the loss of {int(bad.sum())} of {len(bad)} samples, at sigma {sigma.min():.3g} to {sigma.max():.3g}"
    else:
        what = "the gradient, though not the loss"
    weights = ((f"{role}.{name}", p) for role, net in networks.items() for name, p in net.named_parameters())
    gradients = ((f"{turn}.{name}", p.grad) for name, p in networks[turn].named_parameters())
    where = _first_bad(weights)
    where = f"in the weights {where}" if where else f"in the gradient of {_first_bad(gradients)}"
    return Diverged(f"the {turn}'s turn after {images} images gave no finite number: {what}, first {where}")


def require_finite(networks: Mapping[str, nn.Module], images: int) -> None:
    """Before a state is saved: it is one to go back to.  Raises: Diverged: a weight is NaN or infinite."""
    where = _first_bad((f"{role}.{name}", p) for role, net in networks.items() for name, p in net.named_parameters())
    if where:
        raise Diverged(f"after {images} images the weights {where} are not finite")


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and not tensor.isfinite().all():
            return f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
    return None


def fingerprints(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """A number for each network that changes with any bit of its weights: the sum of their bits as integers."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    return {
        role: sum(int(p.detach().view(bits[p.dtype]).sum()) for p in network.parameters())
        for role, network in networks.items()
    }


def require_moved(turn: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raises: TrainingError: a turn left its own network where it was, or moved another."""
    moved = [role for role in before if before[role] != after[role]]
    if moved != [turn]:
        raise TrainingError(
            f"the first turn of the {turn} moved {' and '.join(moved) or 'no network'} instead of the {turn} alone: "
            "check training.lr, and that the loss depends on that network"
        )
