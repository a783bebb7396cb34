"""The weight of a loss over times, learnt beside the network."""

from __future__ import annotations

from torch import Tensor


def adaptive(error: Tensor, u: Tensor) -> Tensor:
    """e^-u / D |error|^2 + u: least where u is the logarithm of error's mean square, so that all times weigh the same.

    Args:
        error: what is to be small.  [B,C,H,W]
        u: of the network's head, at the time of each error.  [B]
    Returns: each sample's loss.  [B]
    Source: Karras et al. 2024 (EDM2), eq. 22; Lu & Song 2025 (sCM), appendix D with w = -u.
    """
    return (-u).exp() * error.square().flatten(1).mean(1) + u
