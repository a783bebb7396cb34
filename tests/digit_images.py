"""The digits that ship with the package, and images stored in ways that evaluate takes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from edmdistill.data.datasets import open_dataset

TRAIN, TEST = open_dataset("digits"), open_dataset("digits", split="test")


def held_out() -> Tensor:
    return TEST.images(range(len(TEST)))


def write_npz(path: Path, images: Tensor, **columns: object) -> Path:
    np.savez(path / "x.npz", images=images.permute(0, 2, 3, 1).numpy(), **columns)
    return path / "x.npz"


def write_folder(path: Path, images: Tensor, classes: list[int] | None, suffix: str = "png") -> Path:
    folder = path / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:06d}.{suffix}")
    if classes is not None:
        labels = [[f"{i:06d}.{suffix}", c] for i, c in enumerate(classes)]
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder
