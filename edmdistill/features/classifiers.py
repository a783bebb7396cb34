"""Classifiers for rejection sampling: those of embedded sets, or a file of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from edmdistill.embedded import EMBEDDED
from edmdistill.errors import EdmDistillError, counted
from edmdistill.features.script import Script
from edmdistill.features.spaces import embedded_space, load_features


def load_classifier(source: str, label_dim: int, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Returns a function from images, uint8 [N,C,H,W], to ln p(class | image), float64 [N,label_dim].

    Args:
        source: a key of EMBEDDED; a .safetensors of other weights for the classifier of one; or a TorchScript file that
            takes images [N,C,H,W] in [-1, 1] and gives logits [N,label_dim].
        label_dim: the classes of the network whose images are judged.
    Raises: EdmDistillError: that has none; and, on the first images, the classifier has others.
        CheckpointError: the file cannot be read.
    """
    if not label_dim:
        raise EdmDistillError("rejection keeps the best of each class, but this network has none: leave it out")
    if source in EMBEDDED:
        logits = load_features(source, device=device).logits
    elif Path(source).suffix == ".safetensors":
        logits = load_features(embedded_space(source), source, device).logits
    else:
        network = Script(source, device)

        def logits(images: Tensor) -> Tensor:
            out: Tensor = network(images.to(device, torch.float32) / 127.5 - 1)
            return out

    @torch.no_grad()
    def log_probability(images: Tensor) -> Tensor:
        out = logits(images)
        if not isinstance(out, Tensor):
            raise EdmDistillError(
                f"the classifier {source} must return a tensor of logits [N,{label_dim}]: check the file"
            )
        if out.shape != (len(images), label_dim):
            raise EdmDistillError(
                f"the classifier {source} gives {list(out.shape)} for {counted(len(images), 'image')} of "
                f"{counted(label_dim, 'class')}, but "
                f"{[len(images), label_dim]} was expected: name one of the network's own classes"
            )
        return functional.log_softmax(out.to(torch.float64), 1)

    return log_probability
