"""EDM's augmentation, without leaks: the network is conditioned on it, and samples, with labels of 0, show none of it.

    x0' = x0, flipped and moved: what is at p, from the center, comes from M (p - shift)
    a   = augmentation labels: the amount of each augmentation, 0 where it was left out
    F(x_t, t, labels, a)

Half of the images are mirrored; each of the other augmentations has a probability of `augment`.

Source: Karras et al. 2022 (EDM), appendix F.2, and the official code (training/augment.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import torch
import torch.nn.functional as f
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.kernels.resampling import downsample, separable, upsample
from edmdistill.methods.base import Batch, Role

Augmentation = Literal["xflip", "yflip", "scale", "rotation", "anisotropy", "translation"]
LABELS: dict[Augmentation, int] = {
    "xflip": 1, "yflip": 1, "scale": 1, "rotation": 2, "anisotropy": 2, "translation": 2
}  # fmt: skip
"""The numbers that tell of each augmentation, in the order of the network's input."""

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""The low-pass filter of the wavelet sym6, by which images have twice their resolution while they are moved."""


Augment = Annotated[
    float,
    Meta(ge=0, le=1, description="probability of each of EDM's augmentations; the network is conditioned on them"),
]
Augmentations = Annotated[tuple[Augmentation, ...], Meta(min_length=1, description="which augmentations these are")]


class AugmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a method whose network may learn from augmented images."""

    augment: Augment = 0.0
    augmentations: Augmentations = tuple(LABELS)

    def __post_init__(self) -> None:
        check_augment(self)


class AugmentOptions(Protocol):
    """A config with the options of AugmentConfig, which msgspec does not let it inherit beside others."""

    @property
    def augment(self) -> float: ...

    @property
    def augmentations(self) -> tuple[Augmentation, ...]: ...


def check_augment(config: Any) -> None:
    """Raises: ValueError: augmentations that are not in order, or that nothing reads."""
    if not config.augment:
        refuse_idle(config, ("augmentations",), "augment = 0", "set augment above 0")
    if list(config.augmentations) != [name for name in LABELS if name in config.augmentations]:
        raise ValueError(f"augmentations must be some of {', '.join(LABELS)}, each once and in this order")


def augment_role(role: Role, config: AugmentOptions) -> Role:
    """Returns the role, conditioned on the augmentation labels."""
    labels = sum(LABELS[name] for name in config.augmentations) if config.augment else 0
    return role._replace(augment_dim=labels)


class Move(NamedTuple):
    """An augmentation of each image: the pixel at p comes from M (p - shift).

    Attributes:
        labels: its amounts, 0 for no augmentation.  [B,k]
        matrix: M.  [B,2,2]
        shift: in widths and heights of the image.  [B,2]
    """

    labels: Tensor
    matrix: Tensor
    shift: Tensor


def augmented(batch: Batch, draws: Draws, config: AugmentOptions) -> Batch:
    """Returns the batch with augmented images and their augmentation labels; the batch as it is, if augment = 0."""
    if not config.augment:
        return batch
    x0, labels = batch.x0, []
    for name in config.augmentations:
        if name in FLIPS:
            flip = draws.uniform() < 0.5
            if name != "xflip":
                flip &= draws.uniform() < config.augment
            x0 = torch.where(flip[:, None, None, None], x0.flip(FLIPS[name]), x0)
            labels.append(flip[:, None])
    moves = [MOVES[name](draws, config.augment) for name in config.augmentations if name in MOVES]
    if moves:
        matrix, shift = moves[0].matrix, moves[0].shift
        for move in moves[1:]:
            matrix, shift = matrix @ move.matrix, shift + move.shift  # the last alone has one
        x0 = moved(x0, matrix, shift)
    labels += [move.labels for move in moves]
    return batch._replace(x0=x0, augment_labels=torch.cat([each.to(x0) for each in labels], dim=1))


def scale(draws: Draws, p: float) -> Move:
    """Enlarges by 2^(w / 5), w ~ N(0, 1)."""
    w = sometimes(draws.normal(), draws, p)
    factor = (-w / 5).exp2()
    return unshifted(w[:, None], diagonal(factor, factor))


def rotation(draws: Draws, p: float) -> Move:
    """Rotates by any angle."""
    w = sometimes(angles(draws), draws, p)
    return unshifted(torch.stack([w.cos() - 1, w.sin()], dim=1), rotating(w))


def anisotropy(draws: Draws, p: float) -> Move:
    """Stretches by 2^(w / 5), w ~ N(0, 1), and compresses as much across; half of the time along x."""
    w, r = sometimes(draws.normal(), draws, p), sometimes(angles(draws), draws, 0.5)
    factor = (-w / 5).exp2()
    matrix = rotating(-r) @ diagonal(factor, 1 / factor) @ rotating(r)
    return unshifted(torch.stack([w * r.cos(), w * r.sin()], dim=1), matrix)


def translation(draws: Draws, p: float) -> Move:
    """Shifts by w / 8 of the image in x and in y, w ~ N(0, 1)."""
    w = torch.where((draws.uniform() < p)[:, None], draws.normal(2), 0.0)
    one = torch.ones_like(w[:, 0])
    return Move(w, diagonal(one, one), w / 8)


FLIPS: Mapping[Augmentation, int] = {"xflip": 3, "yflip": 2}
MOVES: Mapping[Augmentation, Callable[[Draws, float], Move]] = {
    "scale": scale,
    "rotation": rotation,
    "anisotropy": anisotropy,
    "translation": translation,
}


def moved(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Returns images in which what is at p, from the center, comes from M (p - shift) of x.

    Beyond the image is its reflection, and beyond that 0.

    Args:
        x: [B,C,H,W]
        matrix: M.  [B,2,2]
        shift: in widths and heights.  [B,2]
    Differs: the official code pads all images as far as one of the batch needs; here each is padded to its reflection.
    """
    height, width = x.shape[2:]
    kernel = separable(SYM6, "cpu").to(x.device)
    fine = upsample(f.pad(x, (width - 1, width - 1, height - 1, height - 1), mode="reflect"), kernel)
    edge = len(SYM6) // 4  # pixels beyond the image that the filter reads
    size = torch.tensor([width, height], dtype=matrix.dtype, device=x.device)
    # Half pixels from the center, and from half a pixel to its right: the filter has an even number of taps.
    axes = (torch.arange(1 - n, n + 1).to(matrix) / 2 for n in (width + 2 * edge, height + 2 * edge))
    p = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)
    source = torch.einsum("bij,bhwj->bhwi", matrix, p - (shift * size)[:, None, None])
    grid = (2 * source - 0.5) / (3 * size - 2)  # in [-1, 1] over `fine`
    return downsample(f.grid_sample(fine, grid.to(x), align_corners=False), kernel)[:, :, edge:-edge, edge:-edge]


def sometimes(w: Tensor, draws: Draws, p: float) -> Tensor:
    """Returns w with probability p, else 0.  [B]"""
    return torch.where(draws.uniform() < p, w, 0.0)


def angles(draws: Draws) -> Tensor:
    """Draws angles from [-pi, pi).  [B]"""
    return (2 * draws.uniform() - 1) * math.pi


def unshifted(labels: Tensor, matrix: Tensor) -> Move:
    return Move(labels, matrix, torch.zeros_like(matrix[:, 0]))


def diagonal(x: Tensor, y: Tensor) -> Tensor:
    """[B], [B] -> [B,2,2]"""
    return torch.stack([x, y], dim=1).diag_embed()


def rotating(angle: Tensor) -> Tensor:
    """Returns the matrices of rotations by an angle.  [B] -> [B,2,2]"""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
