"""Data sets: embedded ones, and zips or folders in EDM's layout, of images or of a VAE's latents.

A data set is an indexed collection of images of one shape, with or without integer classes. The order in which training
visits it is no state of it, but a pure function: `data.order`.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edmdistill.checkpoints.encoder import UNRECORDED, Encoding
from edmdistill.data.contents import read_contents
from edmdistill.data.decode import decode_array, decode_image
from edmdistill.data.files import EXPECTED, Files, Member, as_dataset_error, open_files
from edmdistill.data.given import checked_classes, require_stored
from edmdistill.data.labels import class_folders
from edmdistill.data.latents import checked_moments
from edmdistill.embedded import EMBEDDED, EmbeddedSet
from edmdistill.errors import DatasetError, counted, printable

IN_MEMORY_BYTES = 2**28  # smaller sets are decoded when opened, so that every error appears at once
HASHED_BYTES, HASHED_FILES = 2**28, 2**14
"""How much of a folder is read for its fingerprint; a zip's directory has a CRC of every file."""

Stored = NDArray[np.uint8 | np.float32]


class Dataset:
    """Images of one shape, with or without classes. It can be pickled, for worker processes.

    Args:
        name: the source, for errors and results.
        split: the part of the source that this is.
        files: the name of each image, for errors.  [N]
        read: returns image i as stored: pixels, uint8 [C,H,W]; or the mean and then the standard deviation of its
            latents, float32 [2C,H,W].
        labels: the class of each image, int64 [N], or None.
        label_names: the name of each class, where known.
        xflip: every image occurs twice: N + i is i mirrored.
        content: returns the sha256 of the images, in hex; default: of all that `read` returns.
        notes: sentences on what was left out of the source.
        encoding: how latents were made; default: as by EDM2's tool, if they have the channels of its VAE.
        prepared: how `data prepare` made the images, or those of the latents; None: unknown.
        turned: those of the images read so far whose EXIF data say that they are to be turned, which is ignored.
    Attributes:
        latent: whether it holds latents.
        encoding: how they were made; None for images, or where it is unknown.
        img_channels, img_resolution, label_dim: C, H = W and the number of classes, as a network needs them.
        label_names: the name of each class, or None.
        source_notes: `notes` without the one on classes without images.
    Raises:
        DatasetError: there are no images; one cannot be read, is not square, not stored as above, or differs in shape
            from the first; the classes are not one for each; or xflip of latents.
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
        content: Callable[[], str] | None = None,
        notes: Sequence[str] = (),
        encoding: Encoding | None = None,
        prepared: Mapping[str, Any] | None = None,
        turned: Set[int] = frozenset(),
    ) -> None:
        self.name, self.split, self.xflip, self.prepared = name, split, xflip, prepared
        self.turned = turned
        if not len(files):
            raise DatasetError(f"{name} has no images: give at least one")
        labels = checked_classes(labels, len(files), name)
        self.label_dim = 0 if labels is None else max(int(labels.max()) + 1, len(label_names or ()))
        self.label_names = None if label_names is None else list(label_names)
        self._content, self.source_notes = content, list(notes)
        self._labels = np.tile(labels, 2) if xflip and labels is not None else labels
        self.files, self._read = files, read
        first = read(0)
        require_stored(first, f"{name}: {files[0]}")
        self.latent = first.dtype != np.uint8
        self._shape = first.shape
        self.img_channels, self.img_resolution = len(first) // 2 if self.latent else len(first), first.shape[2]
        self.encoding = (encoding or UNRECORDED) if self.latent else None
        if self.encoding is not None and len(self.encoding.raw_mean) != self.img_channels:
            if encoding is not None:
                raise DatasetError(
                    f"{name} holds latents of {counted(self.img_channels, 'channel')}, but its dataset.json has the "
                    f"statistics of {len(encoding.raw_mean)}; encode the images again"
                )
            self.encoding = None
        if first.shape[1] != first.shape[2]:
            raise DatasetError(
                f"{name}: {files[0]} is {_size(first)}, but images must be square; `edmdistill data prepare` crops them"
            )
        if self.latent and xflip:
            raise DatasetError(
                f"{name} holds latents, and mirrored latents are not the VAE's latents of the mirrored image: leave "
                "data.xflip out, or encode the mirrored images too"
            )
        self._memory: Stored | None = None
        if len(files) * first.nbytes <= IN_MEMORY_BYTES:
            self._memory = np.stack([self._checked(i) for i in range(len(files))])

    def __len__(self) -> int:
        return len(self.files) * (2 if self.xflip else 1)

    @property
    def size(self) -> tuple[int, int, int]:
        """C, H and W of an image, or of latents drawn from the set."""
        return self.img_channels, self.img_resolution, self.img_resolution

    @property
    def notes(self) -> list[str]:
        """Sentences for the user on files that were left out and classes that have no images."""
        missing = self.missing_classes
        if not missing:
            return list(self.source_notes)
        sentence = (
            f"{self.name}: {len(missing):,} of the {self.label_dim:,} classes {'have' if len(missing) > 1 else 'has'} "
            f"no image, the first {missing[0]}"
        )
        first = " (the labels begin at 1, and classes are counted from 0)" if self._labels_start_at_one() else ""
        return [*self.source_notes, f"{sentence}{first}."]

    def note(self, sentence: str) -> None:
        """Adds a sentence for the user to `notes`, once."""
        if sentence not in self.source_notes:
            self.source_notes.append(sentence)

    @property
    def class_counts(self) -> list[int]:
        """The number of images of each class, without mirrored ones; empty for a set without classes."""
        if self._labels is None:
            return []
        counts: list[int] = np.bincount(self._labels[: len(self.files)], minlength=self.label_dim).tolist()
        return counts

    @property
    def missing_classes(self) -> list[int]:
        """The classes without images."""
        return [label for label, count in enumerate(self.class_counts) if count == 0]

    def _labels_start_at_one(self) -> bool:
        """Returns whether the labels are 1 to K."""
        used = np.flatnonzero(self.class_counts)
        return self.label_names is None and bool(len(used)) and used[0] == 1 and len(used) == used[-1]

    def use_classes(self, label_dim: int, label_names: Sequence[str] | None = None) -> None:
        """Sets the classes to those of a network: `label_dim` becomes its own, and `notes` says which have no images.

        Args:
            label_dim: the network's number of classes; 0: it is unconditional, and nothing changes.
            label_names: its names of the classes, where known.
        Raises: DatasetError: the set has no classes, or more than the network.
        """
        if not label_dim:
            return
        if self._labels is None or self.label_dim > label_dim:
            first = "; its labels begin at 1: subtract 1 from each" if self._labels_start_at_one() else ""
            folders = f": {self.folders_to_classes}" if self.folders_to_classes else ""
            raise DatasetError(
                f"{self.name} has {self.label_dim or 'no'} classes, but the network has {label_dim}, 0 to "
                f"{label_dim - 1}{first or folders or ': give data with these classes'}"
            )
        self.label_dim = label_dim
        for i, (ours, theirs) in enumerate(zip(self.label_names or (), label_names or (), strict=False)):
            if ours != theirs:
                self.note(f"{self.name}: class {i} is {ours!r} there, and {theirs!r} to the network.")
                break

    @property
    def folders_to_classes(self) -> str:
        """How the top folders of a set without classes become its classes; empty where they hardly are any."""
        folders = 0 if self._labels is not None or self.latent else class_folders(self.files)
        command = f"`edmdistill data prepare {shlex.quote(self.name)} OUT.zip --labels folders`"
        return f"{command} makes its {folders:,} top folders classes" if folders else ""

    def require_clear_classes(self) -> None:
        """Checks the classes for a network that is to be made for them; `notes` says if folders are taken for none.

        Raises: DatasetError: they are 1 to K, so that the network would never be trained on class 0.
        """
        if self._labels_start_at_one():
            raise DatasetError(
                f"{self.name} has labels from 1 to {self.label_dim - 1}, but classes are counted from 0: subtract 1 "
                "from each label in dataset.json"
            )
        if folders := self.folders_to_classes:
            self.note(f"{self.name} has no classes, so the network will have none; {folders}.")

    @cached_property
    def content_sha256(self) -> str:
        """Hex digest of the images in their order, independent of the names of the source and its files.

        It covers the sizes and CRCs of the files: of all files in a zip. In a folder of more than HASHED_BYTES or
        HASHED_FILES, only every k-th file is read, k as small as possible, and the others count by name and size.
        """
        if self._content is not None:
            return self._content()
        digest = hashlib.sha256()
        for i in range(len(self.files)):
            digest.update(self._read(i).tobytes())
        return digest.hexdigest()

    @cached_property
    def labels_sha256(self) -> str | None:
        """Hex digest of the classes in their order, or None for a set without classes."""
        if self._labels is None:
            return None
        return hashlib.sha256(self._labels[: len(self.files)].astype("<i8").tobytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex digest of images and classes, independent of all names."""
        return hashlib.sha256(f"{self.content_sha256} {self.labels_sha256}".encode()).hexdigest()

    def require_pixels(self) -> None:
        """Raises DatasetError if these are latents."""
        if self.latent:
            raise DatasetError(f"{self.name} holds latents, but pixels are needed; give the images they were made from")

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Returns images as stored.  uint8 [B,C,H,W]

        Raises: DatasetError: they are latents.
        """
        self.require_pixels()
        return self._stored(indices)

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor | None:
        """Returns the classes of images, or None for a set without classes.  int64 [B]"""
        return None if self._labels is None else torch.from_numpy(self._labels[np.asarray(indices)])

    def tensors(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns images and classes as float32.

        Returns: pixels [B,C,H,W] in [-1, 1], v / 127.5 - 1, or the moments of latents [B,2C,H,W] as stored; one-hot
            labels [B,label_dim], or None.
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
        require_stored(image, f"{self.name}: {self.files[i]}")
        if image.shape != self._shape:
            first = self._read(0)
            raise DatasetError(
                f"{self.name}: {self.files[i]} is {_size(image)}, but {self.files[0]} is {_size(first)}; "
                "all images must have one size and number of channels: `edmdistill data prepare` makes them RGB, and "
                "of one size with --resolution"
            )
        return image


def open_dataset(source: str | Path, *, split: str = "train", xflip: bool = False, lossless: bool = False) -> Dataset:
    """Opens a zip or folder in EDM's layout, or an embedded set.

    A zip or folder holds images, or latents as EDM2's dataset_tool.py writes them (.npy), in any subfolders, and may
    hold a dataset.json, {"labels": [["sub/name.png", class], ...], "label_names": [name, ...]}; all of it is a training
    set. The embedded ones are described in `edmdistill.embedded`.

    Args:
        source: a path, or a key of EMBEDDED: digits, tiles.
        split: train | test | all.
        xflip: see `Dataset`.
        lossless: refuse images of lossy formats.
    Raises:
        DatasetError: no such source or split; no images, or a broken one; dataset.json broken or incomplete.
    """
    if embedded := EMBEDDED.get(str(source)):
        return _open_embedded(embedded, split, xflip)
    if not str(source).strip():  # as a path it would be the working directory
        raise DatasetError(f"the name of the data set is empty; {EXPECTED}")
    path = Path(source)
    if split not in ("train", "all"):
        raise DatasetError(f"{path} has no split {split!r}: a zip or folder is one training set; use 'train'")
    files = open_files(path)
    contents = read_contents(files)
    labels = contents.labels
    names = [printable(member.name) for member in contents.images]
    turned: set[int] = set()
    read = _Reader(files, contents.images, contents.latent, lossless, turned)
    return Dataset(
        str(path),
        split,
        names,
        read,
        labels.classes,
        labels.names,
        xflip=xflip,
        content=partial(_content_sha256, files, contents.images),
        notes=contents.notes(str(path)),
        encoding=labels.encoding,
        prepared=labels.prepared,
        turned=turned,
    )


def _open_embedded(embedded: EmbeddedSet, split: str, xflip: bool) -> Dataset:
    images, classes, splits = embedded.load()
    if split not in splits:
        raise DatasetError(f"the {embedded.name} have no split {split!r}; choose one of {', '.join(splits)}")
    rows = splits[split]
    files, names = [f"{embedded.item} {i}" for i in rows], list(embedded.label_names)
    path = Path(embedded.name)
    notes = [f"{path} is the embedded data set; what has that name here is ./{path}."] if path.exists() else []
    read = images[rows].__getitem__
    return Dataset(embedded.name, split, files, read, classes[rows], names, xflip=xflip, notes=notes)


@dataclass(frozen=True)
class _Reader:
    """Reads image i of a zip or a folder, as stored."""

    files: Files
    images: Sequence[Member]
    latent: bool
    lossless: bool
    turned: set[int]

    def __call__(self, i: int) -> Stored:
        name = self.images[i].name
        where = f"{self.files.path}: {printable(name)}"
        kind = "array" if self.latent else "image"
        with as_dataset_error(lambda why: f"{where} is not a readable {kind} ({why}); replace or remove it"):
            data = self.files.read(name)
        if not self.latent:
            return decode_image(data, where, lossless=self.lossless, on_turned=lambda: self.turned.add(i))
        return checked_moments(decode_array(data, where), where, i)


def _content_sha256(files: Files, images: Sequence[Member]) -> str:
    """Returns Dataset.content_sha256 of files."""
    total = sum(member.size for member in images)
    stride = max(1, math.ceil(total / HASHED_BYTES), math.ceil(len(images) / HASHED_FILES))
    digest = hashlib.sha256()
    for i, member in enumerate(images):
        crc = member.crc
        if crc is None and i % stride == 0:
            crc = zlib.crc32(files.read(member.name))
        content = member.name if crc is None else f"{crc:08x}"
        digest.update(f"{member.size} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size(image: Stored) -> str:
    channels, height, width = image.shape
    return f"{width}x{height} with {counted(channels, 'channel')}"
