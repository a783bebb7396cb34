"""The augmentation of what a discriminator sees: differentiable, and drawn for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from edmdistill.draws import Draws

Augmentation = Literal["color", "translation", "cutout"]


def augment(x: Tensor, draws: Draws, augmentations: Sequence[Augmentation]) -> Tensor:
    """Returns x after these augmentations, drawn for each image; differentiable.  [B,C,H,W], data in [-1, 1]

    Source: Zhao et al. 2020 (DiffAugment), section 3.2.
    """
    for augmentation in augmentations:
        x = AUGMENTATIONS[augmentation](x, draws)
    return x


def color(x: Tensor, draws: Draws) -> Tensor:
    """Changes brightness by up to .5, saturation by a factor of 0 to 2 and contrast by a factor of .5 to 1.5."""
    brightness, saturation, contrast = draws.uniform(3).to(x)[:, :, None, None, None].unbind(1)
    x = x + brightness - 0.5
    gray = x.mean(1, keepdim=True)
    x = gray + 2 * saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def translation(x: Tensor, draws: Draws) -> Tensor:
    """Shifts by up to an eighth of the image in each direction, filling with 0."""
    for dim, u in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        max_shift = round(size / 8)
        shift = (u * (2 * max_shift + 1)).floor() - max_shift
        source = torch.arange(size, device=x.device) + shift[:, None]
        inside = ((source >= 0) & (source < size)).to(x.dtype)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        index = source.clamp(0, size - 1).long().reshape(shape).expand_as(x)
        x = x.gather(dim, index) * inside.reshape(shape)
    return x


def cutout(x: Tensor, draws: Draws) -> Tensor:
    """Sets a square of half the image's size, around a random pixel, to 0."""
    outside = torch.zeros_like(x[:, :1], dtype=torch.bool)
    for dim, u in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        side = size // 2
        first = (u * (size + 1 - side % 2)).floor() - side // 2
        offset = torch.arange(size, device=x.device) - first[:, None]
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        outside = outside | ((offset < 0) | (offset >= side)).reshape(shape)
    return x * outside.to(x.dtype)


AUGMENTATIONS: dict[Augmentation, Callable[[Tensor, Draws], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}
