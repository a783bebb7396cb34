"""The images of an evaluation, from wherever they come, read a few at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.store import CONFIG
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import DatasetError
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.grid import to_uint8

LOSSY = (".jpg", ".jpeg", ".webp")

Scheme = Literal["balanced", "given", "none", "unknown"]


@dataclass(frozen=True)
class Images:
    """Images of one size.

    Attributes:
        count: their number N.
        size: (C, H, W).
        read: gives the images of a range.  uint8 [B,C,H,W]
        classes: int64 [N], or None.
        seeds: of each image, or None where they are unknown.
        scheme: where the classes come from. balanced: class = seed modulo the number of classes; given: any others;
            none: the network is unconditional; unknown: nothing is known of them.
    """

    count: int
    size: tuple[int, ...]
    read: Callable[[range], Tensor]
    classes: Tensor | None
    seeds: Sequence[int] | None
    scheme: Scheme


def is_images(source: str | Path) -> bool:
    """Whether a source is images, and not a network: an .npz, a zip, or a folder that is no checkpoint and no run."""
    path = Path(source)
    if path.is_dir():
        return not (path / CONFIG).exists() and not (path / "recipe.toml").exists()
    return path.suffix in (".npz", ".zip")


def drawn(model: Generator | Denoiser, seeds: Sequence[int], draw: Callable[..., Tensor]) -> Images:
    """Images that a network draws as they are read, their classes balanced.

    Args:
        draw: (seeds=..., labels=...) -> images [B,C,H,W] in [-1, 1].
    """
    flow = model.flow
    classes = torch.tensor(seeds) % flow.label_dim if flow.label_dim else None

    def read(rows: range) -> Tensor:
        labels = None if classes is None else classes[rows.start : rows.stop]
        return to_uint8(draw(seeds=seeds[rows.start : rows.stop], labels=labels))

    size = (flow.img_channels, flow.img_resolution, flow.img_resolution)
    return Images(len(seeds), size, read, classes, seeds, "none" if classes is None else "balanced")


def found(source: Tensor | str | Path, label_dim: int) -> Images:
    """Images that are there already.

    Args:
        source: uint8 [N,C,H,W]; an .npz with images uint8 [N,H,W,C], and seeds [N] and labels [N] if they are known; or
            a folder or zip of lossless images, with a dataset.json for their classes. Files that are named by numbers
            are taken to be named by seeds, as sample names them.
        label_dim: the number of classes that a balanced choice is over.
    Raises: DatasetError: the images cannot be read, or are JPEGs or latents.
    """
    classes, seeds = None, None
    if isinstance(source, Tensor):
        pixels = source
    elif Path(source).suffix == ".npz":
        pixels, classes, seeds = _read_npz(Path(source))
    else:
        data = open_dataset(source)
        lossy = [file for file in data.files if file.lower().endswith(LOSSY)]
        if lossy:
            raise DatasetError(
                f"{source}: {lossy[0]} was compressed with loss, which changes every metric; measure PNGs"
            )
        names = [PurePosixPath(file).stem for file in data.files]
        seeds = [int(name) for name in names] if all(name.isdecimal() for name in names) else None
        classes = data.labels(range(len(data)))
        size = (data.img_channels, data.img_resolution, data.img_resolution)
        return Images(len(data), size, data.images, classes, seeds, _scheme(classes, seeds, label_dim))
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise DatasetError(
            f"images to be measured are uint8 [N,C,H,W], but these are {pixels.dtype} {list(pixels.shape)}; "
            "sampling.grid.to_uint8 makes them from [-1, 1]"
        )
    return Images(
        len(pixels),
        tuple(pixels.shape[1:]),
        lambda rows: pixels[rows.start : rows.stop],
        classes,
        seeds,
        _scheme(classes, seeds, label_dim),
    )


def _scheme(classes: Tensor | None, seeds: Sequence[int] | None, label_dim: int) -> Scheme:
    if classes is None:
        return "unknown"
    balanced = seeds is not None and label_dim and torch.equal(classes, torch.tensor(seeds) % label_dim)
    return "balanced" if balanced else "given"


def _read_npz(path: Path) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """Images [N,C,H,W], classes [N] and seeds of an .npz as sample writes it; a class of -1 is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} is not a readable .npz ({error}); draw it again with edmdistill sample") from error
    if "images" not in held:
        raise DatasetError(
            f"{path} holds {', '.join(held) or 'nothing'}, but images were expected (uint8 [N,H,W,C]); "
            "latents must be decoded first"
        )
    images = held["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DatasetError(f"{path}: images are {images.dtype} {list(images.shape)}, but uint8 [N,H,W,C] were expected")
    labels, seeds = held.get("labels"), held.get("seeds")
    for name, column in (("labels", labels), ("seeds", seeds)):
        if column is not None and (column.shape != (len(images),) or column.dtype.kind not in "iu"):
            raise DatasetError(
                f"{path}: {name} are {column.dtype} {list(column.shape)}, but an integer for each of the "
                f"{len(images)} images was expected"
            )
    classes = None if labels is None or (labels < 0).any() else torch.from_numpy(labels.astype(np.int64))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels, classes, None if seeds is None else seeds.tolist()
