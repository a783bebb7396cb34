"""Data sets that a program makes: what would train on other images than it means is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from edmdistill.data.datasets import Dataset
from edmdistill.errors import DatasetError

PIXELS = np.zeros((4, 3, 8, 8), np.uint8)
FILES = [f"image {i}" for i in range(4)]


def make(read: Any = PIXELS.__getitem__, classes: Any = None, files: list[str] = FILES) -> Dataset:
    return Dataset("mine", "train", files, read, classes)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (np.zeros((4, 3, 8, 8), np.float32), r"float32 \[3, 8, 8\]"),  # in [-1, 1], as the network takes them
        (np.zeros((4, 2, 8, 8)), r"float64 \[2, 8, 8\]"),
        (np.zeros((4, 3, 8, 8), np.int64), r"int64 \[3, 8, 8\]"),
        (np.zeros((4, 8, 8), np.uint8), r"uint8 \[8, 8\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "Tensor"),
    ],
    ids=["float32", "float64", "int64", "gray", "torch"],
)
def test_what_is_neither_pixels_nor_latents(given: Any, kind: str) -> None:
    with pytest.raises(DatasetError, match=rf"^mine: image 0 is {kind}, but a data set reads numpy arrays: pixels are"):
        make(given.__getitem__)
    with pytest.raises(DatasetError, match=rf"^mine: image 2 is {kind}"):
        make(lambda i: given[i] if i == 2 else PIXELS[i])


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ([0, 1, 2], r"mine has 4 images, but its classes are int64 \[3\]: give a whole number for each"),
        (np.eye(4), r"its classes are float64 \[4, 4\]"),
        ([0.0, 1.0, 2.0, 3.0], r"its classes are float64 \[4\]"),
        (["a", "b", "c", "d"], "its classes are <U1"),
        ([0, 1, 2, -1], "mine has the class -1, but classes are counted from 0"),
    ],
    ids=["few", "vectors", "floats", "names", "negative"],
)
def test_what_are_no_classes(classes: Any, sentence: str) -> None:
    with pytest.raises(DatasetError, match=sentence):
        make(classes=classes)


@pytest.mark.parametrize("of", [list, torch.tensor, np.int32, np.uint8], ids=["list", "torch", "int32", "uint8"])
def test_classes_of_any_whole_numbers(of: Any) -> None:
    data = make(classes=of([3, 1, 0, 1]))
    assert data.labels(range(4)).tolist() == [3, 1, 0, 1]
    assert data.class_counts == [1, 2, 0, 1]


def test_no_images_at_all() -> None:
    with pytest.raises(DatasetError, match="mine has no images"):
        make(files=[])
