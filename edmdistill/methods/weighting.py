"""Weights of losses: over noise levels, learned with the network, and between the terms of a sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

Balance = Annotated[Literal["adaptive", "fixed"], Meta(description="adaptive: equal gradients in the last layer")]


def adaptive(error: Tensor, u: Tensor) -> Tensor:
    """Returns e^-u / D |error|^2 + u, the loss with learned log variance u.  [B]

    It is minimal where u is the log of error's mean square, so every noise level then contributes equally.

    Args:
        error: residual of the loss.  [B,C,H,W]
        u: output of the network's log-variance head at each sample's time.  [B]
    Source: Karras et al. 2024 (EDM2), eq. 22; Lu & Song 2025 (sCM), appendix D with w = -u.
    """
    return (-u).exp() * error.square().flatten(1).mean(1) + u


def mean_rms(x: Tensor) -> Tensor:
    """Returns the root mean square of a sample, averaged over samples, as a signal; so micro-batches add up.  []"""
    return x.detach().square().flatten(1).mean(1).sqrt().mean()


def balanced_sum(
    losses: Mapping[str, Tensor], weights: Mapping[str, float], gradients: Mapping[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted sum of losses [B], and as signals each loss's mean and, but for the first, its weight.

    Args:
        losses: by name, the reference first.  [B] each
        weights: by name; default: 1.
        gradients: multiply the weights by `gradient_balance`; None: the weights as they are.
    """
    reference = next(iter(losses))
    value = torch.zeros_like(losses[reference])
    signals: dict[str, Tensor] = {}
    for name, loss in losses.items():
        one = torch.ones_like(value[0])
        weight = weights.get(name, 1.0) * (one if gradients is None else gradient_balance(gradients, name, reference))
        value = value + weight * loss
        signals |= {name: loss.detach().mean()} | ({} if name == reference else {f"lambda_{name}": weight})
    return value, signals


def gradient_balance(gradients: Mapping[str, Tensor], name: str, reference: str) -> Tensor:
    """Returns lambda = |gradient of the reference loss| / (|gradient of the named loss| + 1e-4); 1 for the reference.

    lambda is clamped to [0, 1e4], for the loss "gan" to [.01, 10].

    Args:
        gradients: gradient of each loss in the last layer's weight, by name.  [numel] each
    Returns: 0-dim.
    Source: Kim et al. 2024 (CTM), section 3.3; the bounds are the official code's.
    """
    norm, reference_norm = gradients[name].norm(), gradients[reference].norm()
    if name == reference:
        return torch.ones_like(norm)
    weight: Tensor = (reference_norm / (norm + 1e-4)).clamp(0, 1e4)
    return weight.clamp(0.01, 10) if name == "gan" else weight
