"""TrigFlow: noise level <-> time, and steps along the circle of data and noise.

    x_t = cos(t) x0 + sin(t) z,    z ~ N(0, sigma_data^2 I),    t in [0, pi/2]

EDM's x_sigma = x0 + sigma n is the same point up to scale: x_t = cos(t) x_sigma with sigma = sigma_data tan(t).
Images are [B,C,H,W]; times are [] or [B] and are broadcast only here. Functions of time are computed in float64 and
cast to the image's dtype.

Source: Lu & Song 2025 (sCM), section 3 and appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edmdistill.torch_state import as_tensor
from edmdistill.transfer import is_gpu


def sigma_to_time(sigma: Tensor | float, sigma_data: float) -> Tensor:
    """Returns t = arctan(sigma / sigma_data), float64, in [0, pi/2].

    sigma: in [0, inf], any shape.  Source: sCM, section 3.
    """
    return torch.atan(as_tensor(sigma).to(torch.float64) / sigma_data)


def time_to_sigma(t: Tensor | float, sigma_data: float) -> Tensor:
    """Returns sigma = sigma_data tan(t), float64, in [0, inf).

    t: in [0, pi/2), any shape.  Source: sCM, section 3.
    """
    return torch.tan(as_tensor(t).to(torch.float64)) * sigma_data


def written_levels(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Returns noise levels as documents have them, without the rounding of a way to time and back or to float32.

    80.00000000000027 is 80, of 12 digits; 0.30000001192092896 is 0.3, the shortest number that float32 rounds to it.
    """
    return tuple(
        float(str(short) if float(short := np.float32(sigma)) == sigma else f"{sigma:.12g}") for sigma in sigmas
    )


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Returns t [] or [B] as a float64 tensor that broadcasts over x [B,...]."""
    if not t.ndim and is_gpu(x.device) and t.device.type == "cpu":
        t = torch.full((), float(t), dtype=torch.float64, device=x.device)  # a copy would be waited for
    return t.to(x.device, torch.float64).reshape(-1, *[1] * (x.ndim - 1))


def cos_sin(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos(t) and sin(t), computed in float64, in x's dtype and broadcastable over x."""
    wide = expand(t, x)
    return wide.cos().to(x.dtype), wide.sin().to(x.dtype)


def diffuse(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Returns x_t = cos(t) x0 + sin(t) z.  x0, z, x_t [B,C,H,W]; z has standard deviation sigma_data."""
    cos, sin = cos_sin(t, x0)
    return cos * x0 + sin * z


def velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Returns dx_t/dt = cos(t) z - sin(t) x0, the target of sigma_data F.  [B,C,H,W]"""
    cos, sin = cos_sin(t, x0)
    return cos * z - sin * x0


def denoised(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """Returns x0 = cos(t) x_t - sin(t) sigma_data F: the denoiser and the consistency function.  Source: sCM, eq. 5."""
    cos, sin = cos_sin(t, x_t)
    return cos * x_t - sin * (sigma_data * F)


def implied_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Returns z = (x_t - cos(t) x0) / sin(t), the noise of std sigma_data in x_t given its data x0.  t in (0, pi/2]."""
    cos, sin = cos_sin(t, x_t)
    return (x_t - cos * x0) / sin


def ddim_step(x_t: Tensor, F: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Returns x_s = cos(t-s) x_t - sin(t-s) sigma_data F, a deterministic step from t to s.  Source: sCM, section 3."""
    return denoised(x_t, F, t - s, sigma_data)


def ddim_flow(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Returns the F whose DDIM step leads from x_t to x_s, the inverse of `ddim_step`.  s < t"""
    cos, sin = cos_sin(t - s, x_t)
    return (cos * x_t - x_s) / (sin * sigma_data)
