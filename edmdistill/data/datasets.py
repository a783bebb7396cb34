"""Data sets: scikit-learn's digits, and zips or folders in EDM's layout, of images or of a VAE's latents.

A data set is an indexed collection of images of one shape, with or without integer classes. The order in which training
visits it is no state of the data set but a pure function, `indices`: a run resumes from its position.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from edmdistill.errors import DatasetError

IMAGE_SUFFIXES = (".png", ".bmp", ".webp", ".jpg", ".jpeg")
LATENT_SUFFIX = ".npy"
IN_MEMORY_BYTES = 2**28  # smaller sets are decoded when they are opened, so that every error comes at once
DIGITS, DIGITS_TRAIN, DIGITS_SPLIT_SEED = 1797, 1500, 0
BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)

Stored = NDArray[np.uint8 | np.float32]


class Dataset:
    """Images of one shape, with or without classes. It can be pickled, for worker processes.

    Args:
        name: the source, as errors and results call it.
        split: the part of the source that this is.
        files: what errors call each image; their number is the length.
        read: gives image i as it is stored: pixels, uint8 [C,H,W]; or its latents' mean, then standard deviation,
            float32 [2C,H,W].
        labels: the class of each image, int64 [N], or None.
        label_names: the name of each class, where known.
        xflip: every image is there twice: N + i is i mirrored.
    Attributes:
        latent: whether it holds latents.
        img_channels, img_resolution, label_dim: C, H = W and the number of classes, as a network needs them.
    Raises:
        DatasetError: an image cannot be read, is not square, or differs in shape from the first; or latents are to
            be mirrored.
    """

    def __init__(
        self,
        name: str,
        split: str,
        files: Sequence[str],
        read: Callable[[int], Stored],
        labels: NDArray[np.int64] | None = None,
        label_names: Sequence[str] | None = None,
        *,
        xflip: bool = False,
    ) -> None:
        self.name, self.split, self.xflip = name, split, xflip
        self.label_dim = 0 if labels is None else int(labels.max()) + 1
        self.label_names = None if label_names is None else list(label_names)
        self._labels = np.tile(labels, 2) if xflip and labels is not None else labels
        self.files, self._read = files, read
        first = read(0)
        self.latent = first.dtype != np.uint8
        self._shape = first.shape
        self.img_channels, self.img_resolution = len(first) // 2 if self.latent else len(first), first.shape[2]
        if first.shape[1] != first.shape[2]:
            raise DatasetError(f"{name}: {files[0]} is {_size(first)}, but images must be square; crop them first")
        if self.latent and xflip:
            raise DatasetError(
                f"{name} holds latents, and a VAE's latents of a mirrored image are not the mirrored latents: leave "
                "data.xflip out, or encode mirrored images beside the others"
            )
        self._memory: Stored | None = None
        if len(files) * first.nbytes <= IN_MEMORY_BYTES:
            self._memory = np.stack([self._checked(i) for i in range(len(files))])

    def __len__(self) -> int:
        return len(self.files) * (2 if self.xflip else 1)

    def image(self, i: int) -> Tensor:
        """Image i as it is stored.  uint8 [C,H,W]"""
        return self.images([i])[0]

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """These images as they are stored.  uint8 [B,C,H,W]

        Raises: DatasetError: they are latents.
        """
        if self.latent:
            raise DatasetError(f"{self.name} holds latents, but pixels are wanted; give the images they were made from")
        return self._stored(indices)

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor | None:
        """The classes of these images, or None for a set without classes.  int64 [B]"""
        return None if self._labels is None else torch.from_numpy(self._labels[np.asarray(indices)])

    def label(self, i: int) -> int:
        """The class of image i.  Raises DatasetError for a set without classes."""
        if self._labels is None:
            raise DatasetError(f"{self.name} has no labels; add a dataset.json with a class for every image")
        return int(self._labels[i])

    def tensors(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """These images and classes as numbers to compute with.

        Returns: pixels [B,C,H,W] in [-1, 1], v / 127.5 - 1, or the moments of latents [B,2C,H,W] as they are; one-hot
            labels [B,label_dim], or None; all float32.
        """
        stored, classes = self._stored(indices), self.labels(indices)
        numbers = stored if self.latent else stored.to(torch.float32) / 127.5 - 1
        return numbers, None if classes is None else functional.one_hot(classes, self.label_dim).to(torch.float32)

    def _stored(self, indices: Sequence[int] | Tensor) -> Tensor:
        rows = np.asarray(indices)
        mirrored = rows >= len(self.files) if self.xflip else np.zeros(len(rows), dtype=bool)
        rows = rows - len(self.files) * mirrored
        if self._memory is not None:
            stored = torch.from_numpy(self._memory[rows])
        else:
            stored = torch.from_numpy(np.stack([self._checked(int(i)) for i in rows]))
        stored[mirrored] = stored[mirrored].flip(-1)
        return stored

    def _checked(self, i: int) -> Stored:
        image = self._read(i)
        if image.shape != self._shape:
            first = self._read(0)
            raise DatasetError(
                f"{self.name}: {self.files[i]} is {_size(image)}, but {self.files[0]} is {_size(first)}; "
                "bring all images to one size and number of channels"
            )
        return image


def open_dataset(source: str | Path, *, split: str = "train", xflip: bool = False) -> Dataset:
    """Opens the word `digits`, or a zip or folder in EDM's layout.

    A zip or folder holds images, or latents as EDM2's dataset_tool.py writes them (.npy), in subfolders or not, and may
    hold a dataset.json, {"labels": [["sub/name.png", class], ...]}; it is a training set as a whole. The digits are
    scikit-learn's, 8x8, one channel, 0..16 scaled to 0..255: `train` is a fixed random 1500 of the 1797, `test` the
    other 297.

    Args:
        split: train | test | all.
        xflip: see `Dataset`.
    Raises:
        DatasetError: no such source or split; no images, or a broken one; dataset.json broken or incomplete.
    """
    if str(source) == "digits":
        return _open_digits(split, xflip)
    path = Path(source)
    if split not in ("train", "all"):
        raise DatasetError(f"{path} has no split {split!r}: a zip or folder is one training set; use 'train'")
    if path.is_dir():
        members = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return _open_files(path, split, xflip, members, partial(_read_file, path))
    if not path.exists():
        raise DatasetError(f"{path} does not exist; give a zip, a folder, or the word digits")
    read = _Zip(path)
    try:
        members = read.archive.namelist()
    except BROKEN as error:
        raise DatasetError(f"{path} is not a zip ({error}); give a zip, a folder, or the word digits") from error
    return _open_files(path, split, xflip, members, read)


def indices(seed: int, position: int, batch: int, length: int) -> Tensor:
    """The indices at [position, position + batch) of an endless stream of shuffled epochs.

    Epoch e is a permutation that (seed, e) alone decides, so the stream is the same in batches of any size.

    Args:
        position: the number of samples drawn before these.
        length: the size of the data set.
    Returns: int64 [batch].
    """
    first, last = position // length, (position + batch - 1) // length
    stream = np.concatenate([_permutation(seed, epoch, length) for epoch in range(first, last + 1)])
    start = position - first * length
    return torch.from_numpy(stream[start : start + batch])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    # PCG64's raw words are the same in every release of numpy, which Generator.permutation does not promise.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(length), kind="stable")


def _open_digits(split: str, xflip: bool) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "the digits need scikit-learn, which is not installed: pip install 'edmdistill[quickstart]'"
        ) from error
    order = _permutation(DIGITS_SPLIT_SEED, 0, DIGITS)
    splits = {"train": order[:DIGITS_TRAIN], "test": order[DIGITS_TRAIN:], "all": order}
    if split not in splits:
        raise DatasetError(f"the digits have no split {split!r}; choose one of {', '.join(splits)}")
    chosen = np.sort(splits[split])
    values, classes = load_digits(return_X_y=True)
    images = np.round(values[chosen].reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    files, names = [f"digit {i}" for i in chosen], [str(digit) for digit in range(10)]
    classes = classes[chosen].astype(np.int64)
    return Dataset("digits", split, files, images.__getitem__, classes, names, xflip=xflip)


class _Zip:
    """Reads members of a zip; every process opens the file for itself, for one that is shared has one position."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def __call__(self, member: str) -> bytes:
        return self.archive.read(member)

    def __reduce__(self) -> tuple[type[_Zip], tuple[Path]]:
        return _Zip, (self.path,)


def _read_file(path: Path, member: str) -> bytes:
    return (path / member).read_bytes()


def _open_files(path: Path, split: str, xflip: bool, members: Sequence[str], read: Callable[[str], bytes]) -> Dataset:
    suffixes = (*IMAGE_SUFFIXES, LATENT_SUFFIX)
    # `edmdistill sample` leaves a grid beside its images.
    files = sorted(name for name in members if name.lower().endswith(suffixes) and name != "grid.png")
    if not files:
        raise DatasetError(f"{path} holds no images; expected files that end in {', '.join(suffixes)}")
    latents = [name for name in files if name.lower().endswith(LATENT_SUFFIX)]
    if 0 < len(latents) < len(files):
        raise DatasetError(
            f"{path} holds {len(latents)} latents, the first {latents[0]}, among {len(files)} files; keep images and "
            "latents in two data sets"
        )
    labels = _read_labels(path, files, read) if "dataset.json" in members else None
    decode = partial(_decode_latents if latents else _decode_image, path, files, read)
    return Dataset(str(path), split, files, decode, labels, xflip=xflip)


def _decode_latents(path: Path, files: Sequence[str], read: Callable[[str], bytes], i: int) -> NDArray[np.float32]:
    try:
        moments = np.lib.format.read_array(io.BytesIO(read(files[i])), allow_pickle=False)
    except BROKEN as error:
        raise DatasetError(f"{path}: {files[i]} is not a readable array ({error}); replace or remove it") from error
    found = f"{moments.dtype} {list(moments.shape)}"
    if moments.dtype == np.float32 and moments.ndim == 3 and moments.size and len(moments) % 2 == 0:
        smallest = moments[len(moments) // 2 :].min()
        if smallest >= 0:
            return moments
        found += f" with a standard deviation of {smallest:g}"
    raise DatasetError(
        f"{path}: {files[i]} is {found}, but latents are float32 [2C,H,W], means and then standard deviations; encode "
        "the images as EDM2's dataset_tool.py does"
    )


def _decode_image(path: Path, files: Sequence[str], read: Callable[[str], bytes], i: int) -> NDArray[np.uint8]:
    member = files[i]
    try:
        with Image.open(io.BytesIO(read(member))) as image:
            pixels, mode = np.asarray(image), image.mode
    except BROKEN as error:
        raise DatasetError(f"{path}: {member} is not a readable image ({error}); replace or remove it") from error
    if mode not in ("L", "RGB"):
        raise DatasetError(f"{path}: {member} has mode {mode}; convert it to 8-bit grayscale (L) or RGB")
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_labels(path: Path, files: Sequence[str], read: Callable[[str], bytes]) -> NDArray[np.int64] | None:
    try:
        entries = json.loads(read("dataset.json"))["labels"]
        known = None if entries is None else {str(file): label for file, label in entries}
    except (*BROKEN, KeyError, TypeError) as error:
        raise DatasetError(
            f'{path}: dataset.json is not {{"labels": [[file, class], ...]}} ({error!r}); mend or remove it'
        ) from error
    if known is None:
        return None
    missing = [file for file in files if file not in known]
    if missing:
        raise DatasetError(
            f"{path}: dataset.json has no label for {len(missing)} of {len(files)} images, the first {missing[0]}; "
            "label all or none"
        )
    for file in files:
        if type(known[file]) is not int or known[file] < 0:
            raise DatasetError(f"{path}: dataset.json labels {file} as {known[file]!r}; classes are integers from 0")
    return np.array([known[file] for file in files], dtype=np.int64)


def _size(image: Stored) -> str:
    channels, height, width = image.shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
