"""The base of all kinds of output: samples are stored as they are drawn, by position, and completed at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from edmdistill.atomic import atomic_write
from edmdistill.sampling.grid import MARK, image_grid, save_grid

MAX_GRID = 1024
"""Samples that a grid shows."""


Layout = Literal["edmdistill", "adm"]
"""Names of the arrays in an .npz: images, seeds and labels, or those that ADM's evaluator reads, arr_0 and arr_1."""


class SampleInfo(NamedTuple):
    """The record of an output on its samples.

    Attributes:
        digest: of the request that they are drawn for.
        classes: of each sample, or None.  [N]
        label_names: of all classes, or None.
        latent: they are latents of a VAE.
        layout: of an .npz.
    """

    digest: str
    classes: Sequence[int] | None = None
    label_names: Sequence[str] | None = None
    latent: bool = False
    layout: Layout = "edmdistill"


def grid_digest(path: Path) -> str | None:
    """Returns the digest of the request that a grid was written for; None: it is no grid of ours."""
    try:
        # Image.open refuses a grid of many pixels, of which none is decoded here.
        with PngImageFile(path) as image:
            return str(image.info.get(MARK))
    except (OSError, SyntaxError, ValueError):
        return None


class Output(ABC):
    """Where samples are stored as they are drawn.

    Attributes:
        out: the file or folder that was named.
        folder: what holds the samples and the record of their request until `out` is complete.
        info: what the samples are.
        drawn: seeds of the stored samples, by position.
    """

    def __init__(self, out: Path, folder: Path, info: SampleInfo) -> None:
        self.out, self.folder, self.info = out, folder, info
        self.drawn: dict[int, int] = {}

    @abstractmethod
    def is_complete(self, overwrite: bool) -> bool:
        """Returns whether `out` holds all samples of the request, as far as itself can tell.

        Raises: EdmDistillError: it exists with other content, which may not be overwritten.
        """

    @abstractmethod
    def claim(self, overwrite: bool) -> None:
        """Makes sure that a folder without a record can be written.

        Raises: EdmDistillError: it holds files of others, or something is in the way.
        """

    @abstractmethod
    def clear(self) -> None:
        """Removes the samples of another request, and nothing else."""

    @abstractmethod
    def recover(self, seeds: Sequence[int] | None) -> None:
        """Finds the samples that are stored, and removes torn files."""

    @abstractmethod
    def start(self, seeds: Sequence[int] | None) -> None:
        """Writes what can be written before any sample is drawn."""

    @abstractmethod
    def put(self, seeds: Mapping[int, int], values: Tensor) -> None:
        """Stores samples.

        Args:
            seeds: by position, ascending; not empty.
            values: uint8 images or float32 latents.  [B,C,H,W]
        """

    @abstractmethod
    def finish(self) -> None:
        """Writes what needs all samples."""

    @abstractmethod
    def close(self) -> None:
        """Removes what a complete output needs no longer."""

    @abstractmethod
    def read(self, positions: Sequence[int]) -> Tensor:
        """Returns stored samples.  positions: ascending, from the first.  uint8 [N,C,H,W]"""

    def write_grid(self, path: Path) -> None:
        """Writes a picture of the first samples, with a row for each class if there are two or more of each on average.

        Nothing is written where no sample is stored.
        """
        positions = sorted(self.drawn)[:MAX_GRID]
        if not positions:
            return
        classes = None if self.info.classes is None else [self.info.classes[position] for position in positions]
        rows = classes if classes is not None and 2 * len(set(classes)) <= len(classes) else None
        with atomic_write(path) as new:
            save_grid(image_grid(self.read(positions), labels=rows), new, **{MARK: self.info.digest})
