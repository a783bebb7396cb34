"""The magnitude-preserving operations of EDM2: inputs of unit variance give outputs of unit variance.

Source: Karras et al. 2024 (EDM2), appendix B; each docstring names the equation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edmdistill.kernels.backend import uses_triton
from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent_of
from edmdistill.kernels.linear import conv2d, linear
from edmdistill.kernels.winograd import FrozenWeight


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x / (1e-4 + rms of x over dim), statistics in float32.  Source: eq. 47 (weights), eq. 30 (pixel norm)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=at_least_float32(x.dtype))
    dims = (dim,) if isinstance(dim, int) else dim
    # Counted over the reduced axes, not from numel(): a batch size that export leaves open stays open.
    size = math.prod([x.shape[d] for d in dims])
    return x / (norm / math.sqrt(size) + 1e-4).to(x.dtype)


@tangent_of(torch.linalg.vector_norm)
def vector_norm_rule(
    function: Function, norm: Tensor, x: Dual, *, dim: Any, keepdim: bool, dtype: torch.dtype
) -> Tensor:
    """<x, dx> / |x|; at 0, which has no derivative, 0."""
    inner = (x.value.to(dtype) * x.tangent.to(dtype)).sum(dim, keepdim)
    return inner / norm.clamp(min=torch.finfo(dtype).tiny)


SILU_RMS = 0.596
"""rms of silu(x) for a normal x, by which EDM2 divides it.  Source: eq. 81."""


def mp_weight(weight: Tensor, gain: Tensor | float = 1.0, factor: float = 1.0) -> Tensor:
    """Returns the weight that a layer computes with: factor gain w / |w| for each output w, in float32 or better.

    Networks multiply by no constants: a layer's `factor` holds those of its input and output.

    Args:
        weight: [M,...]
        gain: 0-dim, learned.
    Source: eq. 47, 66, with a gain.
    """
    if weight.dtype == torch.float32 and uses_triton(weight):
        from edmdistill.kernels import magnitude_triton  # it needs Triton

        return magnitude_triton.mp_weight(weight, gain, factor)
    wide = weight.to(at_least_float32(weight.dtype))
    fan_in = weight[0].numel()
    return normalize(wide, tuple(range(1, weight.ndim))) * (gain * (factor / math.sqrt(fan_in)))


def mp_scale(weight: Tensor, gain: Tensor | float = 1.0, factor: float = 1.0) -> Tensor:
    """Returns the factors by which `mp_weight` multiplies a weight [M,...], but for rounding.  [M,1,...]"""
    norm = torch.linalg.vector_norm(
        weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=at_least_float32(weight.dtype)
    )
    root = math.sqrt(weight[0].numel())
    scale: Tensor = gain * (factor / root) / (norm / root + 1e-4)
    return scale


@torch.no_grad()
def normalize_weights_(weights: Sequence[Tensor]) -> None:
    """Brings each output of every weight [M,...] to unit rms, in place.  Source: eq. 66."""
    if weights:
        norms = (torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True) for w in weights)
        rms = [norm / math.sqrt(w[0].numel()) + 1e-4 for norm, w in zip(norms, weights, strict=True)]
        torch._foreach_div_(list(weights), rms)


def mp_conv(x: Tensor, weight: Tensor, frozen: FrozenWeight | None = None) -> Tensor:
    """Convolution [M,C,k,k] or linear map [M,N], by what `mp_weight` returned.  frozen: see conv2d."""
    return linear(x, weight) if weight.ndim == 2 else conv2d(x, weight, frozen=frozen)


def mp_sum_factors(t: float) -> tuple[float, float]:
    """Returns a and b of the sum a x + b y that weighs (1-t) : t and keeps unit variance.  Source: eq. 88."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenates channels so that a and b weigh (1-t) : t whatever their number.  Source: eq. 103."""
    channels = a.shape[1] + b.shape[1]
    parts = []
    for x, factor in zip((a, b), mp_sum_factors(t), strict=True):
        scale = factor * math.sqrt(channels / x.shape[1])
        parts.append(x if scale == 1 else x * scale)
    return torch.cat(parts, dim=1)


def mp_fourier(c: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
    """sqrt(2) cos(freqs c + phases), in float32 or better.  c [B], freqs and phases [N] -> [B,N]  Source: eq. 75."""
    wide = at_least_float32(c.dtype)
    angle = c.to(wide)[:, None] * freqs.to(wide) + phases.to(wide)
    return angle.cos() * math.sqrt(2)
