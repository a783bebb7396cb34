"""Latents of a VAE, as EDM2's data sets store them, and the teacher's x0 drawn from them.

For each image such a set holds the output of the VAE's encoder, the mean and the standard deviation of its latents;
they are drawn anew at each visit of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edmdistill.checkpoints.encoder import ChannelStatistics, LatentEncoder
from edmdistill.draws import Draws
from edmdistill.errors import DatasetError

VISIT = 2**32 - 1
"""In place of the number of a training turn, so that no turn draws the same noise."""


def draw_latents(moments: Tensor, eps: Tensor, scaling: LatentEncoder) -> Tensor:
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


def channel_statistics(moments: Tensor) -> ChannelStatistics:
    """Returns mean and standard deviation of latents as drawn, mean + std eps, by channel.

    Args:
        moments: see `draw_latents`.  [B,2C,H,W]
    """
    mean, std = moments.double().chunk(2, dim=1)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    return ChannelStatistics(mean.mean((0, 2, 3)).tolist(), variance.sqrt().tolist())


def latent_noise(seed: int, start: int, stop: int, *shape: int) -> Tensor:
    """Draws the eps of the visits at positions [start, stop) of the stream that `seed` shuffles.

    Each depends on (seed, position) alone.
    Returns: unit normal.  [stop - start,*shape] float32
    """
    return Draws([seed, 0, VISIT], stop, slice(start, stop)).normal(*shape, dtype=torch.float32)


def checked_moments(moments: NDArray[Any], where: str, i: int) -> NDArray[np.float32]:
    """Returns the moments of latents as a file holds them, once they are checked.

    Args:
        moments: mean, then standard deviation.  [2C,H,W]
        where: the file, for errors.
        i: the number of the image.
    Raises: DatasetError: they are not float32 of that shape, are not finite, or were drawn already.
    """
    actual = f"{moments.dtype} {list(moments.shape)}"
    if moments.dtype == np.float32 and moments.ndim == 3 and moments.size and len(moments) % 2 == 0:
        if not np.isfinite(moments).all():
            channel = int(np.argwhere(~np.isfinite(moments))[0][0])
            raise DatasetError(
                f"{where} (image {i}) holds values that are not finite, the first in channel {channel}; encode it "
                "again, or remove it"
            )
        deviations = moments[len(moments) // 2 :]
        if deviations.min() >= 0 and deviations.max() > 0:
            return moments
        if deviations.max() == 0:
            raise DatasetError(
                f"{where} has a standard deviation of 0 everywhere, so these latents were drawn and scaled already; "
                "store the encoder's means and standard deviations, as EDM2's dataset_tool.py writes them"
            )
        actual += f" with a standard deviation of {deviations.min():g}"
    raise DatasetError(
        f"{where} is {actual}, but latents are float32 [2C,H,W], means and then standard deviations; encode the images "
        "as EDM2's dataset_tool.py does"
    )
