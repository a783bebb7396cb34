"""MNIST's format: what its headers say is what is read, to the last byte."""

import struct
from pathlib import Path

import numpy as np
import pytest
from picture_files import write_mnist

from edmdistill.data.mnist import open_mnist
from edmdistill.errors import DatasetError

DIGITS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
CLASSES = np.array([0, 1, 2, 3, 12], np.uint8)


def test_there_are_names_for_all_classes_or_for_none(tmp_path: Path) -> None:
    """As in EMNIST, which has more than ten; without classes, no file of them is needed."""
    source = write_mnist(tmp_path, DIGITS, CLASSES)
    pictures = open_mnist(source, "auto")
    assert pictures.labels is not None
    assert (pictures.labels.tolist(), pictures.label_names) == (CLASSES.tolist(), [str(i) for i in range(13)])
    for file in tmp_path.iterdir():
        if file != source:
            file.unlink()
    pictures = open_mnist(source, "none")
    assert (pictures.labels, pictures.label_names) == (None, None)


def test_other_shapes_are_not_padded(tmp_path: Path) -> None:
    pictures = open_mnist(write_mnist(tmp_path, DIGITS[:, :, :26], CLASSES), "none")
    assert np.array_equal(np.asarray(pictures.read(1)), DIGITS[1, :, :26])
    assert pictures.notes == []


@pytest.mark.parametrize("count", [4, 6])
def test_there_are_as_many_classes_as_images(count: int, tmp_path: Path) -> None:
    source = write_mnist(tmp_path, DIGITS, np.zeros(count, np.uint8))
    with pytest.raises(DatasetError, match=f"labels {count} images, but .* holds 5; get both again"):
        open_mnist(source, "auto")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ((0x801, 1, 28, 28), bytes(784), "it begins with 0x801"),
        ((0x803, 0, 28, 28), b"", r"it begins with 0x803 and \[0, 28, 28\]"),
        ((0x803, 1, 28, 28), bytes(783), "its header says 784 bytes, and it has fewer"),
        ((0x803, 1, 28, 28), bytes(785), "its header says 784 bytes, and it has more"),
    ],
)
def test_files_of_another_kind_or_size(header: tuple[int, ...], data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4I", *header) + data)
    with pytest.raises(DatasetError, match=message):
        open_mnist(path, "none")
