"""What two images are compared by on the way to a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from edmdistill.features.script import Script
from edmdistill.sampling.files import read_image

LUMA = 0.299, 0.587, 0.114
MASK = "mask:"


def gray(x: Tensor) -> Tensor:
    """Luma: what is kept in colourisation.  [B,1 or 3,H,W] -> [B,1,H,W]"""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def load_feature_net(
    word: str, channels: int, resolution: int, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Features of images of about [-1, 1], float32 [B,C,H,W] -> [B,...].

    Args:
        word: identity: every pixel, for strokes; gray: luma, for colourisation; mask:FILE: where a picture is white,
            for inpainting; or a TorchScript file, of which a row's output is a row's alone.
    Raises: EdmDistillError: the picture does not fit.  CheckpointError: the file cannot be read.
    """
    if word == "identity":
        return lambda x: x
    if word == "gray":
        return gray
    if word.startswith(MASK):
        mask = (read_image(Path(word.removeprefix(MASK)), 1, resolution) > 0).to(device)
        return lambda x: x * mask
    return Script(word, device)
