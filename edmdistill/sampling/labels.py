"""Classes: by number, by name, as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edmdistill.errors import EdmDistillError


def label_vectors(labels: int | Sequence[int] | Tensor, label_dim: int, count: int) -> Tensor:
    """The label vectors of `count` samples.  float32 [count,label_dim]

    Args:
        labels: one class for all, a class a sample [count], or the vectors themselves [count,label_dim].
        label_dim: number of classes; 0 = the network has none.
    Raises: EdmDistillError: an unconditional network, a class out of range, or another number of labels.
    """
    if not label_dim:
        raise EdmDistillError("classes were given, but this network is unconditional: leave them out")
    labels = torch.as_tensor(labels)
    if labels.shape == (count, label_dim):
        return labels.to(torch.float32)
    if labels.is_floating_point() or labels.shape not in ((), (1,), (count,)):
        raise EdmDistillError(
            f"labels of shape {list(labels.shape)} do not fit {count} samples: "
            f"give one class, {count} classes, or vectors [{count}, {label_dim}]"
        )
    outside = labels[(labels < 0) | (labels >= label_dim)]
    if len(outside.flatten()):
        raise EdmDistillError(
            f"class {int(outside.flatten()[0])} does not exist: this network's classes run from 0 to {label_dim - 1}"
        )
    return one_hot(labels.long().expand(count), label_dim).to(torch.float32)


def find_class(word: str, label_dim: int, names: Sequence[str] | None) -> int:
    """The class that a word means: a name, one of the comma-separated synonyms of a name, or a number; case is ignored.

    Raises: EdmDistillError: no such class, or several of that name.
    """
    if not label_dim:
        raise EdmDistillError(f"class {word!r} was asked for, but this network is unconditional: leave the class out")
    classes: dict[str, set[int]] = {}
    for number, name in enumerate(names or ()):
        for synonym in {name, *name.split(",")}:
            classes.setdefault(synonym.strip().lower(), set()).add(number)
    found = sorted(classes.get(word.strip().lower(), ()))
    if len(found) == 1:
        return found[0]
    if found:
        raise EdmDistillError(
            f"{word!r} names the classes {', '.join(map(str, found))}: give the number of the one you mean"
        )
    if word.strip().isdecimal():
        return int(label_vectors(int(word), label_dim, 1).argmax())
    if not classes:
        raise EdmDistillError(
            f"this checkpoint has no class names to look {word!r} up in: give a number from 0 to {label_dim - 1}"
        )
    near = get_close_matches(word.strip().lower(), classes, n=1)
    raise EdmDistillError(
        f"there is no class {word!r}"
        + (f": did you mean {near[0]!r}?" if near else f"; classes run from 0 to {label_dim - 1}")
    )
