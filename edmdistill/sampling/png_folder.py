"""Samples as a folder of PNGs, which is a data set at the same time."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edmdistill.atomic import atomic_write, require_free
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.sampling.grid import to_image
from edmdistill.sampling.output import Output, SampleInfo, grid_digest

REQUEST, LABELS = "samples.json", "dataset.json"
GRID = "-grid.png"
"""Suffix of the grid beside a folder, in which other tools would take it for a sample."""
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of a complete PNG."""


class PngFolder(Output):
    """A folder NAME with 000000.png for seed 0 ... and dataset.json with the classes, and beside it NAME-grid.png."""

    def __init__(self, out: Path, info: SampleInfo) -> None:
        super().__init__(out, out, info)
        self.grid = out.resolve().with_name(out.resolve().name + GRID)

    def is_complete(self, overwrite: bool) -> bool:
        return False  # its record tells

    def claim(self, overwrite: bool) -> None:
        if self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
            raise EdmDistillError(
                f"{self.folder} holds files that edmdistill sample did not write: choose another folder"
            )
        if grid_digest(self.grid) != self.info.digest:
            require_free(self.grid, overwrite)
        if self.grid.parent.exists() and not os.access(self.grid.parent, os.W_OK):
            raise EdmDistillError(
                f"{self.grid.parent} cannot be written, where {self.grid.name} is to be: choose another folder"
            )

    def clear(self) -> None:
        for entry in self.folder.iterdir():
            if re.fullmatch(r"[0-9]{6,}\.png", entry.name) or entry.name in (LABELS, REQUEST):
                entry.unlink()
        self.grid.unlink(missing_ok=True)

    def recover(self, seeds: Sequence[int] | None) -> None:
        for leftover in self.folder.glob(".*.png.*.new"):
            leftover.unlink(missing_ok=True)
        names = {entry.name for entry in self.folder.iterdir()}
        listed = ((i, seed) for i, seed in enumerate(seeds or ()) if _name(seed) in names)
        self.drawn = {i: seed for i, seed in listed if _is_complete(self.folder / _name(seed))}

    def start(self, seeds: Sequence[int] | None) -> None:
        if seeds is not None:
            self._write_labels(dict(enumerate(seeds)))

    def put(self, seeds: Mapping[int, int], values: Tensor) -> None:
        for seed, pixels in zip(seeds.values(), values, strict=True):
            _save_without_fsync(to_image(pixels), self.out / _name(seed))
        self.drawn |= seeds

    def finish(self) -> None:
        self.write_grid(self.grid)
        self._write_labels(self.drawn)

    def close(self) -> None:
        pass

    def read(self, positions: Sequence[int]) -> Tensor:
        pictures = [_read_pixels(self.out / _name(self.drawn[position])) for position in positions]
        return torch.from_numpy(np.stack(pictures))

    def _write_labels(self, seeds: Mapping[int, int]) -> None:
        """Writes a dataset.json as EDM has it, which makes the folder a data set.  seeds: by position."""
        classes, names = self.info.classes, self.info.label_names
        if classes is None:
            return
        document: dict[str, Any] = {"labels": [[_name(seeds[i]), classes[i]] for i in sorted(seeds)]}
        if names is not None:
            document["label_names"] = list(names)
        with atomic_write(self.out / LABELS) as new:
            new.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _name(seed: int) -> str:
    return f"{seed:06d}.png"


def _save_without_fsync(picture: Image.Image, path: Path) -> None:
    """Writes a picture atomically with respect to killed processes.

    There is no fsync, which takes longer than many networks: after a power failure, `_is_complete` finds torn files.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        try:
            picture.save(new, "png")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(PNG_END), 0))
        return file.read() == PNG_END


def _read_pixels(path: Path) -> Any:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
