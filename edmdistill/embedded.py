"""The data sets that come with the package: real images from scikit-learn, each with a teacher and features of its own.

Nothing is read before it is needed, and images are made once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edmdistill.errors import DatasetError
from edmdistill.optional import importing

ASSETS = Path(__file__).parent / "assets"
TILE, TILE_STEP, TILE_SCALES = 16, 8, (1, 2, 4)
TILES_PER_CLASS = {"train": 1000, "test": 150}
TEST_STRIP = 128, 224
"""Columns of the photographs at full size: test tiles are cut from these alone, and training tiles from all others."""


class EmbeddedImages(NamedTuple):
    """The images of a set, their classes, and the rows of each split.

    Attributes:
        images: uint8 [N,C,H,W]
        classes: int64 [N]
        splits: rows in increasing order, by name: train, test and all.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.int64]
    splits: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class EmbeddedSet:
    """A line of EMBEDDED.

    Attributes:
        name: of the data set, its teacher, its feature space and its protocol, wherever one of them is named.
        shape: C, H and W.
        label_names: the name of each class.
        item: what one image is called.
        credit: the origin, authors and licence of the images.
        teacher_sha256: of the teacher's file.
        load: returns the images.
    """

    name: str
    shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    item: str
    credit: str
    teacher_sha256: str
    load: Callable[[], EmbeddedImages]

    @property
    def teacher(self) -> Path:
        """The file of the teacher, in NVIDIA's layout."""
        return ASSETS / f"{self.name}-teacher.pkl"

    @property
    def features(self) -> Path:
        """The file of the feature space's weights."""
        return ASSETS / f"{self.name}-features.safetensors"


def _sklearn(function: str, of: str, **arguments: Any) -> Any:
    """Returns what a loader of scikit-learn returns.  Raises: DatasetError: it cannot be imported."""
    with importing("scikit-learn", extra="quickstart", needed_by=f"the {of} need", error=DatasetError):
        from sklearn import datasets
    return getattr(datasets, function)(**arguments)


@cache
def _digits() -> EmbeddedImages:
    """Returns scikit-learn's digits, 0..16 scaled to 0..255; `train` is a fixed random 1500 of the 1797."""
    values, classes = _sklearn("load_digits", "digits", return_X_y=True)
    order = np.argsort(np.random.PCG64([0, 0]).random_raw(len(values)), kind="stable")
    splits = {"train": np.sort(order[:1500]), "test": np.sort(order[1500:]), "all": np.arange(len(values))}
    images = np.round(values.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    return EmbeddedImages(images, classes.astype(np.int64), splits)


@cache
def _tiles() -> EmbeddedImages:
    """Returns 16x16 tiles of scikit-learn's two photographs, at full size and reduced by 2 and by 4.

    Tiles begin at every 8th pixel of the photograph, whatever the scale. The classes are photograph and scale; each has
    the tiles with the most contrast, in the order of the picture: `train` 1000, `test` 150 from TEST_STRIP.
    """
    begin, end = TEST_STRIP
    parts: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    for photograph in _sklearn("load_sample_images", "tiles").images:
        for scale in TILE_SCALES:
            tiles, left = _cut(photograph, scale)
            right = left + TILE * scale
            for split, here in (
                ("train", (right <= begin) | (left >= end)),
                ("test", (left >= begin) & (right <= end)),
            ):
                parts[split].append(_most_contrast(tiles[here], TILES_PER_CLASS[split]))
    images = np.concatenate([*parts["train"], *parts["test"]])
    classes = [np.repeat(np.arange(len(tiles)), TILES_PER_CLASS[split]) for split, tiles in parts.items()]
    count = sum(map(len, parts["train"]))
    rows = np.arange(len(images))
    return EmbeddedImages(images, np.concatenate(classes), {"train": rows[:count], "test": rows[count:], "all": rows})


def _cut(photograph: NDArray[np.uint8], scale: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the tiles of a photograph reduced by means of squares, and their left edges at full size.

    Args:
        photograph: [H,W,C]
        scale: H and W are divided by it; a rest at the right and the bottom is left out.
    Returns: [N,C,TILE,TILE], [N]
    """
    height, width = (size // scale for size in photograph.shape[:2])
    squares = photograph[: height * scale, : width * scale].reshape(height, scale, width, scale, -1)
    # Integers, so that the pixels are the same everywhere.
    reduced = ((2 * squares.sum((1, 3), dtype=np.int64) + scale**2) // (2 * scale**2)).astype(np.uint8)
    step = TILE_STEP // scale
    tiles = np.lib.stride_tricks.sliding_window_view(reduced, (TILE, TILE), (0, 1))[::step, ::step]
    left = np.broadcast_to(np.arange(tiles.shape[1]) * TILE_STEP, tiles.shape[:2]).reshape(-1)
    return tiles.reshape(-1, *tiles.shape[2:]), left


def _most_contrast(tiles: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Returns the tiles with the largest variance of pixels about the mean of their channel, in their order."""
    values = tiles.reshape(*tiles.shape[:2], -1).astype(np.int64)
    contrast = (values.shape[2] * (values**2).sum(2) - values.sum(2) ** 2).sum(1)
    return tiles[np.sort(np.argsort(-contrast, kind="stable")[:count])]


EMBEDDED = {
    one.name: one
    for one in (
        EmbeddedSet(
            "digits",
            (1, 8, 8),
            tuple("0123456789"),
            "digit",
            "Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak, CC BY 4.0, as in scikit-learn",
            "bd62abab978a2933528cac6ca577e0e6e412c8305a9aec8828d91c84d1d922d5",
            _digits,
        ),
        EmbeddedSet(
            "tiles",
            (3, 16, 16),
            tuple(
                f"{photograph} {scale}" for photograph in ("china", "flower") for scale in ("full", "half", "quarter")
            ),
            "tile",
            "tiles of china.jpg by danielbuechele and flower.jpg by vultilion (Flickr), CC BY 2.0, as in scikit-learn",
            "ddd7e8079393549ac233a424684fad2d0ea3c51a014c3f81dd530cf78fe62d3f",
            _tiles,
        ),
    )
}
"""The embedded sets by name. scikit-learn's README has danielbuechele as the author of both photographs, but for
flower.jpg the address of vultilion's page."""
