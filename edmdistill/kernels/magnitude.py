"""The magnitude-preserving operations of EDM2: each keeps unit variance in, unit variance out.

Source: Karras et al. 2024 (EDM2), appendix B; the equation stands at each function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.ops import conv2d, linear


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x / (1e-4 + rms of x over dim), statistics in float32.  Source: eq. 47 (weights), eq. 30 (pixel norm)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    dims = (dim,) if isinstance(dim, int) else dim
    # Counted over the reduced axes, not from numel(): a batch size that export leaves open stays open.
    size = math.prod([x.shape[d] for d in dims])
    return x / (norm / math.sqrt(size) + 1e-4).to(x.dtype)


def normalize_weight(weight: Tensor) -> Tensor:
    """Each output unit of a weight [M,...], in float32 or better, at unit rms.  Source: eq. 47, 66."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return normalize(wide, tuple(range(1, weight.ndim)))


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
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    angle = c.to(wide)[:, None] * freqs.to(wide) + phases.to(wide)
    return angle.cos() * math.sqrt(2)
