"""Reads CIFAR-10's archives: the Python version, whose pickles are not executed, and the binary version."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edmdistill.checkpoints.class_names import dataset_class_names
from edmdistill.data.files import Files
from edmdistill.data.pictures import Pictures
from edmdistill.errors import DatasetError, counted, printable
from edmdistill.pickles import Budget, StandIn, Unpickler, Unreadable
from edmdistill.stored_tensors import NUMPY, Array

BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
PIXELS, CLASSES = 3 * 32 * 32, 10

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def batches(names: Sequence[str], split: str) -> list[str]:
    """Returns the names of the batches of a split in their order, where all of them are among the names."""
    by_base = {posixpath.basename(name).removesuffix(".bin"): name for name in names}
    if not set(BATCHES["train"]) <= by_base.keys():
        return []
    if split not in BATCHES:
        raise DatasetError(f"CIFAR-10 has no split {split!r}; choose one of {', '.join(BATCHES)}")
    if missing := [batch for batch in BATCHES[split] if batch not in by_base]:
        raise DatasetError(f"the archive of CIFAR-10 has no {missing[0]}; download it again")
    return [by_base[batch] for batch in BATCHES[split]]


def open_cifar10(files: Files, names: Sequence[str], labels: str, split: str) -> Pictures:
    """Returns the pictures of a split, in the order of their batches.

    Raises: DatasetError: a batch is damaged, or classes are to come from folders.
    """
    if labels == "folders":
        raise DatasetError(f"{files.path} is CIFAR-10, whose folders are no classes; leave --labels out")
    chosen = batches(names, split)
    read = [_read(files, name) for name in chosen]
    pixels, classes = (np.concatenate(parts) for parts in zip(*read, strict=True))
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Pictures(
        f"CIFAR-10, {split}",
        [f"{name}, image {i}" for name, (_, part) in zip(chosen, read, strict=True) for i in range(len(part))],
        [PIXELS] * len(images),
        lambda i: Image.fromarray(images[i]),
        classes if labels == "auto" else None,
        dataset_class_names("cifar10") if labels == "auto" else None,
    )


def _read(files: Files, name: str) -> Batch:
    """Returns the images [N,3072] and classes [N] of a batch."""
    data = files.read(name)
    try:
        pixels, classes = _parse_binary(data) if name.endswith(".bin") else _unpickle(data)
        if pixels.dtype != np.uint8 or pixels.shape != (len(classes), PIXELS) or not len(classes):
            raise Unreadable(f"holds {pixels.dtype} {list(pixels.shape)} for {counted(len(classes), 'label')}")
        if classes.min() < 0 or classes.max() >= CLASSES:
            raise Unreadable(f"has labels from {classes.min()} to {classes.max()}, not 0 to {CLASSES - 1}")
    except Unreadable as error:
        reason = str(error).partition(": ")[0]  # without advice on networks
        raise DatasetError(f"{files.path}: {printable(name)} {reason}; download CIFAR-10 again") from error
    return pixels, classes


def _parse_binary(data: bytes) -> Batch:
    rows, rest = divmod(len(data), 1 + PIXELS)
    if rest:
        raise Unreadable(f"takes {len(data):,} bytes, which is no multiple of {1 + PIXELS:,}")
    table = np.frombuffer(data, np.uint8).reshape(rows, 1 + PIXELS)
    return table[:, 1:], table[:, 0].astype(np.int64)


def _unpickle(data: bytes) -> Batch:
    budget = Budget(len(data))
    names = NUMPY | {("_codecs", "encode"): StandIn(partial(_encode, budget))}
    batch = Unpickler(memoryview(data), names, budget=budget).run()
    match batch:
        case {"data": Array(numbers=pixels), "labels": labels}:
            values = labels.numbers.tolist() if isinstance(labels, Array) else labels
            if isinstance(values, list) and all(type(value) is int and 0 <= value < 256 for value in values):
                return np.asarray(pixels), np.array(values, np.int64)
    raise Unreadable("does not hold data and labels")


def _encode(budget: Budget, text: object, encoding: object) -> memoryview:
    """Stand-in for codecs.encode, which gives the bytes in Python 3's pickles of protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise TypeError
    budget.take(len(text))
    return memoryview(text.encode("latin-1"))
