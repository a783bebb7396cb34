"""What a user calls a network with, once it is checked: images, times or noise levels, and classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edmdistill.arguments import shown
from edmdistill.errors import EdmDistillError, counted

Level = Tensor | float | Sequence[float]
"""Times or noise levels: one, or one for each image.  [] or [B]"""
Classes = Tensor | int | Sequence[int]
"""One class, one for each image [B], or vectors [B,label_dim]."""


def class_vectors(labels: Tensor, label_dim: int) -> Tensor:
    """Returns class numbers [B] or vectors [B,label_dim] as float vectors [B,label_dim].

    Raises: ValueError: a class number that is not in [0, label_dim).
    """
    if labels.is_floating_point():
        return labels.reshape(-1, label_dim)
    if labels.ndim <= 1:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= label_dim:
            wrong = low if low < 0 else high
            raise ValueError(f"the network has classes 0 to {label_dim - 1}, but a label is {wrong}")
        return nn.functional.one_hot(labels.long().reshape(-1), label_dim).float()
    return labels.reshape(-1, label_dim).float()


def label_vectors(labels: Classes, label_dim: int, count: int) -> Tensor:
    """Returns the label vectors of `count` samples.  float32 [count,label_dim]

    Args:
        labels: one class for all, a class a sample [count], or the vectors themselves [count,label_dim].
        label_dim: number of classes; 0 = an unconditional network.
    Raises: EdmDistillError: an unconditional network, a class out of range, or another number of labels.
    """
    if not label_dim:
        raise EdmDistillError("classes were given, but this network is unconditional: leave them out")
    fit = f"give one class, one for each, or vectors [{count}, {label_dim}]"
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EdmDistillError(f"labels = {shown(labels)} are no classes, which are numbers from 0: {fit}") from error
    if given.shape == (count, label_dim):
        return class_vectors(given, label_dim).to(torch.float32)
    if given.is_floating_point() or given.shape not in ((), (1,), (count,)):
        raise EdmDistillError(f"labels of shape {list(given.shape)} do not fit {counted(count, 'sample')}: {fit}")
    outside = given[(given < 0) | (given >= label_dim)]
    if len(outside.flatten()):
        raise EdmDistillError(
            f"class {int(outside.flatten()[0])} does not exist: this network's classes run from 0 to {label_dim - 1}"
        )
    return class_vectors(given.expand(count), label_dim)


def classes_of(x: Tensor, labels: Classes | None, label_dim: int) -> Tensor | None:
    """Returns the label vectors of x, where it is; None without labels, which a network without classes ignores.

    Raises: EdmDistillError: see `label_vectors`.
    """
    return None if labels is None or not label_dim else label_vectors(labels, label_dim, len(x)).to(x.device)


def require_images(x: object, channels: int) -> None:
    """Raises: EdmDistillError: x is not float [B,C,H,W] of so many channels."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise EdmDistillError(f"the images {shown(x)} must be a tensor of floats, [B,{channels},H,W]")


def levels(value: Level, name: str, x: Tensor, *, zero: bool) -> Tensor:
    """Returns times or noise levels of x as a tensor, where they are.  [] or [B], or with trailing ones

    Args:
        name: of them.
        zero: whether a number may be 0. Those of a tensor are not looked at, for which a GPU would be waited.
    Raises: EdmDistillError: they are not such numbers, or there is neither one nor one for each of x.
    """
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EdmDistillError(f"{name} = {shown(value)} must be a number, or {len(x)}, one for each image") from error
    if found.numel() not in (1, len(x)):
        raise EdmDistillError(f"{name} = {shown(found)} must be a number, or {len(x)}, one for each image")
    if isinstance(value, float | int) and not (value > 0 or (value == 0 and zero)):
        raise EdmDistillError(f"{name} = {value} must be {'at least' if zero else 'above'} 0")
    return found
