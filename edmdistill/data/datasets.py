"""Image data sets: scikit-learn's digits, and zips or folders of images in EDM's layout.

A data set is an indexed collection of uint8 images of one shape with optional integer classes. The order in which training
visits it is no state of the data set but a pure function, `indices`, so that a run resumes exactly from its position alone.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edmdistill.errors import DatasetError

IMAGE_SUFFIXES = frozenset({".png", ".bmp", ".webp", ".jpg", ".jpeg"})
IN_MEMORY_BYTES = (
    256 * 2**20
)  # sets up to this size are decoded when they are opened, so that every error comes at once
DIGITS_TRAIN = 1500  # of 1797
DIGITS_SPLIT_SEED = 0

Images = NDArray[np.uint8]
Read = Callable[[int], Images]


class Dataset:
    """Images of one shape, with classes or without.

    Args:
        name: the source, as errors and results name it.
        split: the part of the source that this is.
        read: gives image i, uint8 [C,H,W].
        files: what image i is called in errors, and the number of images.
        labels: class of each image, or None.
        label_names: name of each class, where known.
    Raises:
        DatasetError: an image is unreadable or differs in shape from the first.
    """

    def __init__(
        self,
        name: str,
        split: str,
        read: Read,
        files: Sequence[str],
        labels: NDArray[np.int64] | None = None,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.label_names = list(label_names) if label_names is not None else None
        self.label_dim = 0 if labels is None else int(labels.max()) + 1
        self._read, self._files, self._labels = read, files, labels
        shape = read(0).shape
        if shape[1] != shape[2]:
            raise DatasetError(
                f"{name}: {files[0]} is {shape[2]}x{shape[1]}, but images must be square; crop them first"
            )
        self.img_channels, self.img_resolution = int(shape[0]), int(shape[1])
        self._memory: Images | None = None
        if len(files) * int(np.prod(shape)) <= IN_MEMORY_BYTES:
            self._memory = np.stack([self._checked(i) for i in range(len(files))])

    def __len__(self) -> int:
        return len(self._files)

    def image(self, i: int) -> Tensor:
        """Image i as it is stored.  uint8 [C,H,W]"""
        return torch.from_numpy(self._memory[i].copy() if self._memory is not None else self._checked(i))

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images of these indices as they are stored.  uint8 [B,C,H,W]"""
        return torch.stack([self.image(int(i)) for i in indices])

    def label(self, i: int) -> int:
        """The class of image i.  Raises DatasetError where the set has no labels."""
        if self._labels is None:
            raise DatasetError(f"{self.name} has no labels: add them to its dataset.json")
        return int(self._labels[i])

    def tensors(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """What training takes.

        Returns: images [B,C,H,W] float32 in [-1, 1] (v / 127.5 - 1); one-hot labels [B,label_dim] float32, or None.
        """
        x0 = self.images(indices).to(torch.float32) / 127.5 - 1
        if self._labels is None:
            return x0, None
        classes = torch.tensor([self.label(int(i)) for i in indices], dtype=torch.int64)
        return x0, torch.nn.functional.one_hot(classes, self.label_dim).to(torch.float32)

    def _checked(self, i: int) -> Images:
        image = self._read(i)
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if image.shape != expected:
            raise DatasetError(
                f"{self.name}: {self._files[i]} is {_shape(image.shape)}, but {self._files[0]} is {_shape(expected)}; "
                "bring all images to one size and number of channels"
            )
        return image


def open_dataset(source: str | Path, *, split: str = "train") -> Dataset:
    """Opens the word `digits`, or a zip or folder of images in EDM's layout.

    A zip or folder holds images in any subfolders and may hold a dataset.json, {"labels": [["sub/name.png", class], ...]};
    it is a training set as a whole. Digits are scikit-learn's 1797, 8x8, one channel, 0..16 scaled to 0..255; `train` is a
    fixed random 1500 of them and `test` the other 297.

    Args:
        split: train | test | all.
    Raises:
        DatasetError: nothing there, no images, no such split, a broken image or a broken dataset.json.
    """
    if str(source) == "digits":
        return _open_digits(split)
    path = Path(source)
    if split not in ("train", "all"):
        raise DatasetError(f"{path} has no split {split!r}: a zip or folder is one training set")
    if path.is_dir():
        names = [
            Path(root, file).relative_to(path).as_posix()
            for root, _, files in os.walk(path)
            for file in files
        ]
        return _open_files(path, split, names, lambda name: (path / name).read_bytes())
    if not path.is_file():
        raise DatasetError(f"{path} does not exist: give a zip, a folder, or the word digits")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DatasetError(
            f"{path} is not a readable zip ({error}): give a zip, a folder, or the word digits"
        ) from error
    return _open_files(path, split, archive.namelist(), archive.read)


def indices(seed: int, position: int, batch: int, length: int) -> Tensor:
    """The indices at [position, position + batch) of an endless stream of shuffled epochs.

    Epoch e is a permutation that (seed, e) alone decides, so the stream does not depend on how it is cut into batches.

    Args:
        position: samples drawn before these, >= 0.
        length: size of the data set.
    Returns: int64 [batch].
    """
    first, last = position // length, (position + batch - 1) // length
    epochs = np.concatenate([_permutation(seed, epoch, length) for epoch in range(first, last + 1)])
    start = position - first * length
    return torch.from_numpy(epochs[start : start + batch])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    # The raw words of PCG64 are the same in every numpy release, which Generator.permutation does not promise.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(length), kind="stable")


def _open_digits(split: str) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "digits come with scikit-learn, which is not installed: pip install 'edmdistill[quickstart]'"
        ) from error
    order = _permutation(DIGITS_SPLIT_SEED, 0, 1797)
    parts = {
        "train": np.sort(order[:DIGITS_TRAIN]),
        "test": np.sort(order[DIGITS_TRAIN:]),
        "all": np.arange(1797),
    }
    if split not in parts:
        raise DatasetError(f"digits have no split {split!r}: choose one of {', '.join(parts)}")
    values, classes = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    chosen = parts[split]
    return Dataset(
        "digits",
        split,
        lambda i: images[chosen[i]],
        [f"digit {i}" for i in chosen],
        classes[chosen].astype(np.int64),
        [str(digit) for digit in range(10)],
    )


def _open_files(path: Path, split: str, names: Sequence[str], read: Callable[[str], bytes]) -> Dataset:
    files = sorted(name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DatasetError(
            f"{path} holds no images: expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    labels = _labels(path, files, read("dataset.json")) if "dataset.json" in names else None
    return Dataset(str(path), split, lambda i: _decode(path, files[i], read), files, labels)


def _decode(path: Path, name: str, read: Callable[[str], bytes]) -> Images:
    try:
        with Image.open(io.BytesIO(read(name))) as image:
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, zipfile.BadZipFile, ValueError) as error:
        raise DatasetError(
            f"{path}: {name} cannot be read as an image ({error}); replace or remove it"
        ) from error
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
        raise DatasetError(
            f"{path}: {name} has mode {image.mode}, but images must be 8-bit grayscale (L) or RGB; convert it"
        )
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _labels(path: Path, files: Sequence[str], text: bytes) -> NDArray[np.int64] | None:
    try:
        entries = json.loads(text)["labels"]
        known = None if entries is None else {str(name): label for name, label in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f'{path}: dataset.json is not {{"labels": [[file name, class], ...]}} ({error}); write it in that form'
        ) from error
    if known is None:
        return None
    missing = [name for name in files if name not in known]
    if missing:
        raise DatasetError(
            f"{path}: dataset.json gives no label for {len(missing)} of {len(files)} images, the first {missing[0]}; "
            "label all images or none"
        )
    labels = [known[name] for name in files]
    for name, label in zip(files, labels, strict=True):
        if type(label) is not int or label < 0:
            raise DatasetError(
                f"{path}: dataset.json labels {name} as {label!r}, but classes are integers from 0"
            )
    return np.array(labels, dtype=np.int64)


def _shape(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
