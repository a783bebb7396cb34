"""Weights for feature networks: Inception's by a formula, as a state dict in pytorch-fid's names, and files of them."""

import zlib
from pathlib import Path

import numpy as np
import torch
from golden_set import GOLDEN
from torch import Tensor

from edmdistill.features.inception_network import InceptionV3

EVALUATION = GOLDEN / "evaluation"
TINY_DINOV2 = EVALUATION / "dinov2" / "tiny-dinov2.pth"


def inception_weights() -> dict[str, Tensor]:
    """Returns the weights of the golden cases: normal numbers seeded by the name of the tensor, scaled by its kind."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    return {name: torch.from_numpy(_numbers(name, tuple(shape))) for name, shape in shapes.items()}


def _numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("running_var"):
        numbers = 1 + 0.2 * np.abs(numbers)
    elif name.endswith("bn.weight"):
        numbers = 1 + 0.1 * numbers
    elif name.endswith(("bias", "running_mean")):
        numbers = 0.1 * numbers
    else:
        numbers = numbers * np.sqrt(1.6 / np.prod(shape[1:]))
    return numbers.astype(np.float32)


def save_pth(path: Path, tensors: dict[str, Tensor], legacy: bool = False) -> Path:
    """Writes a file of torch.save, of torch before 1.6 if `legacy`; returns its path."""
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    return path


def sizes(cases: dict[str, Tensor]) -> list[str]:
    """Returns the sizes of images in a file of golden cases, each part of the names of its tensors."""
    return [name.partition(".")[2] for name in cases if name.startswith("u8.")]
