"""The losses of a GAN, for each sample, and the augmentation that real and generated images go through.

logits [B,n] are above 0 for what looks real; losses [B] are means over n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.draws import Draws


class GAN(NamedTuple):
    """discriminator: (logits of data, logits of generated images) -> loss; generator: logits of its images -> loss."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


HINGE = GAN(
    discriminator=lambda real, fake: (1 - real).relu().mean(1) + (1 + fake).relu().mean(1),
    generator=lambda fake: -fake.mean(1),
)
"""Source: Lim & Ye 2017, as StyleGAN-XL and CTM's code have it."""

LOG = GAN(
    discriminator=lambda real, fake: f.softplus(-real).mean(1) + f.softplus(fake).mean(1),
    generator=lambda fake: -f.softplus(fake).mean(1),
)
"""-log d(x) - log(1 - d(g)) and log(1 - d(g)), d the sigmoid of the logits.  Source: CTM, section 3.3."""

GANS = {"hinge": HINGE, "log": LOG}

Change = Literal["color", "translation", "cutout"]


def augment(x: Tensor, draws: Draws, changes: Sequence[Change]) -> Tensor:
    """x with each of these changes, drawn for each image; gradients go through.  [B,C,H,W], data in [-1, 1]

    Source: Zhao et al. 2020 (DiffAugment), section 3.2.
    """
    for change in changes:
        x = CHANGES[change](x, draws)
    return x


def color(x: Tensor, draws: Draws) -> Tensor:
    """Brightness by up to .5, saturation by 0 to 2 times, contrast by .5 to 1.5 times."""
    brightness, saturation, contrast = draws.uniform(3).to(x)[:, :, None, None, None].unbind(1)
    x = x + brightness - 0.5
    gray = x.mean(1, keepdim=True)
    x = gray + 2 * saturation * (x - gray)
    level = x.mean((1, 2, 3), keepdim=True)
    return level + (contrast + 0.5) * (x - level)


def translation(x: Tensor, draws: Draws) -> Tensor:
    """By up to an eighth of the image each way; what comes in is 0."""
    for dim, share in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        most = round(size / 8)
        shift = (share * (2 * most + 1)).floor() - most
        at = torch.arange(size, device=x.device) + shift[:, None]
        inside = ((at >= 0) & (at < size)).to(x.dtype)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        index = at.clamp(0, size - 1).long().reshape(shape).expand_as(x)
        x = x.gather(dim, index) * inside.reshape(shape)
    return x


def cutout(x: Tensor, draws: Draws) -> Tensor:
    """A square of half the image's edge around any pixel becomes 0."""
    outside = torch.zeros_like(x[:, :1], dtype=torch.bool)
    for dim, share in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        side = size // 2
        first = (share * (size + 1 - side % 2)).floor() - side // 2
        at = torch.arange(size, device=x.device) - first[:, None]
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        outside = outside | ((at < 0) | (at >= side)).reshape(shape)
    return x * outside.to(x.dtype)


CHANGES: dict[Change, Callable[[Tensor, Draws], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}
