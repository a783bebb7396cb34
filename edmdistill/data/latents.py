"""Latents of a VAE, as EDM2's data sets store them, and the teacher's x0 drawn from them.

For each image such a set holds the output of the VAE's encoder, the mean and the standard deviation of its latents;
they are drawn anew at each visit of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.errors import CheckpointError

VISIT = 2**32 - 1
"""In place of the number of a training turn, so that no turn draws the same noise."""


class LatentScaling(Struct, frozen=True):
    """Scales a VAE's latents to the mean and standard deviation that a teacher expects: x0 = latents scale + bias.

    Attributes:
        scale, bias: of each channel.  [C]
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]


def latent_scaling(encoder: Mapping[str, Any]) -> LatentScaling | None:
    """Returns the scaling of a checkpoint's encoder, or None for a network that works on pixels.

    Raises: CheckpointError: the encoder is neither pixels nor a VAE with scale and bias.
    """
    if encoder["kind"] == "pixels":
        return None
    try:
        return msgspec.convert(encoder, LatentScaling)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint's encoder {encoder['kind']!r} does not say how latents are scaled ({error}): convert the "
            "official file again"
        ) from error


def draw_latents(moments: Tensor, eps: Tensor, scaling: LatentScaling) -> Tensor:
    """Draws x0 = (mean + std eps) scale + bias.

    Args:
        moments: mean, then std, of each image's latents.  [B,2C,H,W]
        eps: unit normal noise.  [B,C,H,W]
    Returns: x0 in the teacher's space.  [B,C,H,W], dtype of moments.
    Source: EDM2, training/encoders.py, StabilityVAEEncoder.encode_latents.
    """
    mean, std = moments.chunk(2, dim=1)
    scale, bias = (moments.new_tensor(values)[:, None, None] for values in (scaling.scale, scaling.bias))
    return (mean + std * eps) * scale + bias


def latent_std(moments: Tensor, scaling: LatentScaling) -> float:
    """Returns the standard deviation of x0 as drawn, of all channels together.

    Args:
        moments: see `draw_latents`.  [B,2C,H,W]
    """
    mean, std = moments.double().chunk(2, dim=1)
    scale, bias = (mean.new_tensor(values)[:, None, None] for values in (scaling.scale, scaling.bias))
    variance = (mean * scale + bias).var(correction=0) + (std * scale).square().mean()
    return float(variance.sqrt())


def latent_noise(seed: int, start: int, stop: int, *shape: int) -> Tensor:
    """Draws the eps of the visits at positions [start, stop) of the stream that `seed` shuffles.

    Each depends on (seed, position) alone.
    Returns: unit normal.  [stop - start,*shape] float32
    """
    return Draws([seed, 0, VISIT], stop, slice(start, stop)).normal(*shape, dtype=torch.float32)
