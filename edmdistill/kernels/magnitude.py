"""The magnitude-preserving operations of EDM2: inputs of unit variance give outputs of unit variance.

Source: Karras et al. 2024 (EDM2), appendix B; each docstring names the equation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.dual import Dual, Function, at_least_float32, tangent_of
from edmdistill.kernels.linear import conv2d, linear


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x / (1e-4 + rms of x over dim), statistics in float32.  Source: eq. 47 (weights), eq. 30 (pixel norm)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=at_least_float32(x.dtype))
    dims = (dim,) if isinstance(dim, int) else dim
    # Counted over the reduced axes, not from numel(): a batch size that export leaves open stays open.
    size = math.prod([x.shape[d] for d in dims])
    return x / (norm / math.sqrt(size) + 1e-4).to(x.dtype)


@tangent_of(torch.linalg.vector_norm)
def vector_norm_rule(function: Function, x: Dual, *, dim: Any, keepdim: bool, dtype: torch.dtype) -> Dual:
    """|x|, <x, dx> / |x|; at 0, which has no derivative, 0."""
    norm = function(x.value, dim=dim, keepdim=keepdim, dtype=dtype)
    inner = (x.value.to(dtype) * x.tangent.to(dtype)).sum(dim, keepdim)
    return Dual(norm, inner / norm.clamp(min=torch.finfo(dtype).tiny))


def normalize_weight(weight: Tensor) -> Tensor:
    """Each output unit of a weight [M,...], in float32 or better, at unit rms.  Source: eq. 47, 66."""
    return normalize(weight.to(at_least_float32(weight.dtype)), tuple(range(1, weight.ndim)))


def mp_conv(x: Tensor, unit_weight: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """Convolution [M,C,k,k] or linear map [M,N] with a weight of unit rms.  Source: eq. 47, with a gain."""
    weight = unit_weight * (gain / math.sqrt(unit_weight[0].numel()))
    return linear(x, weight) if weight.ndim == 2 else conv2d(x, weight)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596.  Source: eq. 81."""
    return f.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1-t) a + t b) / sqrt((1-t)^2 + t^2).  Source: eq. 88."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenates channels so that a and b weigh (1-t) : t whatever their number.  Source: eq. 103."""
    size_a, size_b = a.shape[1], b.shape[1]
    scale = math.sqrt((size_a + size_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale / math.sqrt(size_a) * (1 - t)), b * (scale / math.sqrt(size_b) * t)], dim=1)


def mp_fourier(c: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
    """sqrt(2) cos(freqs c + phases), in float32 or better.  c [B], freqs and phases [N] -> [B,N]  Source: eq. 75."""
    wide = at_least_float32(c.dtype)
    angle = c.to(wide)[:, None] * freqs.to(wide) + phases.to(wide)
    return angle.cos() * math.sqrt(2)
