"""CIFAR-10's batches: whole, of bytes, and with or without their classes."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edmdistill.data.cifar10 import batches, open_cifar10
from edmdistill.data.files import FolderFiles
from edmdistill.errors import DatasetError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
NAMES = [f"data_batch_{i}" for i in range(1, 6)]


def write(folder: Path, **first: Any) -> FolderFiles:
    """Five batches; the first with changes."""
    for i, name in enumerate(NAMES):
        batch = {"data": PIXELS, "labels": [i, 9 - i]} | (first if i == 0 else {})
        (folder / name).write_bytes(pickle.dumps(batch, 4))
    return FolderFiles(folder)


def test_a_part_of_the_archive_is_none() -> None:
    assert batches(NAMES, "train") == NAMES
    assert batches(NAMES[:4], "train") == []
    assert batches(["a.png"], "train") == []


def test_classes_may_be_left_out(tmp_path: Path) -> None:
    files = write(tmp_path)
    with_classes, without = (open_cifar10(files, NAMES, rule, "train") for rule in ("auto", "none"))
    assert with_classes.labels is not None
    assert with_classes.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert len(with_classes.label_names or ()) == 10
    assert (without.labels, without.label_names, len(without.names)) == (None, None, 10)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"data": PIXELS.astype(float)}, r"holds float64 \[2, 3072\] for 2 labels"),
        ({"data": PIXELS[:0], "labels": []}, r"holds uint8 \[0, 3072\] for 0 labels"),
        ({"labels": [True, 0]}, "does not hold data and labels"),
        ({"labels": [1, 2, 3]}, r"holds uint8 \[2, 3072\] for 3 labels"),
        ({"labels": [1, 10]}, "has labels from 1 to 10, not 0 to 9"),
    ],
)
def test_batches_of_something_else(first: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"data_batch_1 {message}; download CIFAR-10 again"):
        open_cifar10(write(tmp_path, **first), NAMES, "auto", "train")
