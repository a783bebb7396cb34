"""Checks what a network is called with: images, times or noise levels, and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edmdistill.arguments import shown
from edmdistill.errors import EdmDistillError, counted
from edmdistill.networks.base import Network
from edmdistill.torch_state import as_tensor

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
        outside = labels[(labels < 0) | (labels >= label_dim)]
        if len(outside):
            raise ValueError(
                f"class {int(outside[0])} does not exist: this network's classes run from 0 to {label_dim - 1}"
            )
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
        given = as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EdmDistillError(f"labels = {shown(labels)} are no classes, which are numbers from 0: {fit}") from error
    if given.shape == (count, label_dim):
        return class_vectors(given, label_dim).to(torch.float32)
    if given.is_floating_point() or given.shape not in ((), (1,), (count,)):
        raise EdmDistillError(f"labels of shape {list(given.shape)} do not fit {counted(count, 'sample')}: {fit}")
    try:
        return class_vectors(given.expand(count), label_dim)
    except ValueError as error:
        raise EdmDistillError(str(error)) from error


def classes_of(x: Tensor, labels: Classes | None, label_dim: int) -> Tensor | None:
    """Returns the label vectors of x, where it is; None without labels, which a network without classes ignores.

    Raises: EdmDistillError: see `label_vectors`.
    """
    return None if labels is None or not label_dim else label_vectors(labels, label_dim, len(x)).to(x.device)


def require_images(x: object, network: Network) -> None:
    """Raises: EdmDistillError: x is not float [B,C,H,W] of the network's channels, in a size that it can halve."""
    channels, least = network.img_channels, 1 << (len(network.arguments["channel_mult"]) - 1)
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise EdmDistillError(f"the images {shown(x)} must be a tensor of floats, [B,{channels},H,W]")
    if any(size < least or size % least for size in x.shape[2:]):
        raise EdmDistillError(f"the images {shown(x)} must have a height and a width that are multiples of {least}")


TIME = "in [0, pi/2]; edmdistill.trigflow.sigma_to_time makes times of noise levels"
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "sigma": (lambda value: 0 < value < math.inf, "above 0 and finite"),
    "t": (lambda value: 0 <= value < math.pi / 2 + 1e-6, TIME),
    "s": (lambda value: 0 <= value < math.pi / 2 + 1e-6, TIME),
    "w": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
}
"""Which numbers a time, a noise level or a weight of guidance may be, and how a sentence says it."""


def levels(value: Level, name: str, count: int | None) -> Tensor:
    """Returns times, noise levels or weights of guidance as a tensor, where they are.  [] or [B], or with trailing ones

    Args:
        name: of them, a key of RANGES. Numbers on a GPU are not looked at, because it would be waited for.
        count: number of images, B; None: any.
    Raises: EdmDistillError: they are not such numbers, or there is neither one nor one for each image.
    """
    many = "several" if count is None else f"{count}, one for each image"
    try:
        numbers = as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EdmDistillError(f"{name} = {shown(value)} must be a number, or {many}") from error
    if count is not None and numbers.numel() not in (1, count):
        raise EdmDistillError(f"{name} = {shown(numbers)} must be a number, or {many}")
    allowed, words = RANGES[name]
    for number in numbers.flatten().tolist() if numbers.device.type == "cpu" else ():
        if not allowed(number):
            raise EdmDistillError(f"{name} = {number:g} must be {words}")
    return numbers


def require_earlier(s: Tensor, t: Tensor) -> None:
    """Raises: EdmDistillError: a time to jump to is after that to jump from.  s, t: as `levels` returns them."""
    if s.device.type != "cpu" or t.device.type != "cpu":
        return
    late = s.flatten() > t.flatten() + 1e-6
    if bool(late.any()):
        first, start = (float(time.flatten().expand_as(late)[late][0]) for time in (s, t))
        raise EdmDistillError(
            f"s = {first:g} is after t = {start:g}, but a jump leads to an earlier time: give an s that is at most t"
        )
