"""Samples as one file, an .npz or a grid: their parts are in a hidden folder beside it until it is complete."""

from __future__ import annotations

import shutil
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edmdistill.atomic import atomic_write, remove_leftovers
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.sampling.output import Output, SampleInfo, grid_digest

NO_CLASS = -1
"""The class of an unconditional sample in an .npz."""


class SingleFile(Output):
    """A file that is written at the end, and holds the digest of its request."""

    def __init__(self, out: Path, info: SampleInfo) -> None:
        super().__init__(out, out.parent / f".{out.name}.parts", info)
        self._stored: dict[int, tuple[Path, int]] = {}  # seed: its part, and its row there

    def is_complete(self, overwrite: bool) -> bool:
        if not self.out.exists():
            return False
        if self._read_digest() == self.info.digest:
            self.close()  # left by a kill just after the file was complete
            remove_leftovers(self.out.parent, self.out.name)
            return True
        if not overwrite:
            raise EdmDistillError(
                f"{self.out} already exists, and of complete outputs only a folder takes further seeds: choose another "
                "name, or add --overwrite"
            )
        return False

    def claim(self, overwrite: bool) -> None:
        self.close()  # killed before its request was written, or after

    def clear(self) -> None:
        shutil.rmtree(self.folder)

    def recover(self, seeds: Sequence[int] | None) -> None:
        places = {seed: position for position, seed in enumerate(seeds or ())}
        for part in self.folder.glob("*.npz"):
            try:
                with np.load(part, allow_pickle=False) as file:
                    stored = list(zip(file["positions"].tolist(), file["seeds"].tolist(), strict=True))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                part.unlink()  # torn by a power failure: its samples are drawn again
                continue
            for row, (position, seed) in enumerate(stored):
                self._stored[seed] = part, row
                place = position if seeds is None else places.get(seed)  # the part may be of fewer seeds
                if place is not None:
                    self.drawn[place] = seed

    def start(self, seeds: Sequence[int] | None) -> None:
        pass

    def put(self, seeds: Mapping[int, int], values: Tensor) -> None:
        part = self.folder / f"seed-{next(iter(seeds.values())):010d}.npz"  # positions may belong to another request's
        with atomic_write(part) as new, new.open("wb") as file:
            np.savez(file, values=values.numpy(), positions=np.array([*seeds]), seeds=np.array([*seeds.values()]))
        self._stored |= {seed: (part, row) for row, seed in enumerate(seeds.values())}
        self.drawn |= seeds

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, positions: Sequence[int]) -> Tensor:
        pixels: list[Any] = []
        for values in self.values():
            pixels.extend(values)
            if len(pixels) >= len(positions):
                break
        return torch.from_numpy(np.stack(pixels[: len(positions)]))

    def values(self) -> Iterator[Any]:
        """Yields the stored samples in order.  [B,C,H,W] each

        Raises: CheckpointError: some are gone.
        """
        places = [self._stored[self.drawn[position]] for position in sorted(self.drawn)]
        parts = {*self.folder.glob("*.npz")}
        if (count := sum(part in parts for part, _ in places)) < len(places):  # on a file system without locks
            raise CheckpointError(
                f"{self.folder} has {count:,} of the {len(places):,} images that were drawn, because another process "
                "writes there: run the same command again"
            )
        load = lru_cache(2)(_read_values)  # seeds of two requests may alternate
        for part, run in groupby(places, key=itemgetter(0)):
            yield load(part)[[row for _, row in run]]

    @abstractmethod
    def _read_digest(self) -> str | None:
        """Returns the digest of the request that the file was written for."""


class GridFile(SingleFile):
    """A .png of the first samples."""

    def finish(self) -> None:
        self.write_grid(self.out)

    def _read_digest(self) -> str | None:
        return grid_digest(self.out)


class NpzFile(SingleFile):
    """An .npz: images uint8 [N,H,W,C] (or latents float32 [N,C,H,W]), seeds and labels int64 [N], -1 = no class.

    In ADM's layout: arr_0, images uint8 [N,H,W,3], and, of a network with classes, arr_1, labels int64 [N].
    Source: guided-diffusion, scripts/image_sample.py and evaluations/evaluator.py.
    """

    def finish(self) -> None:
        positions, classes, latent = sorted(self.drawn), self.info.classes, self.info.latent
        adm = self.info.layout == "adm"
        labels = [NO_CLASS if classes is None else classes[position] for position in positions]
        if adm:
            columns = {} if classes is None else {"arr_1": labels}
        else:
            columns = {"seeds": [self.drawn[position] for position in positions], "labels": labels}
        name, shape = ("arr_0" if adm else "latents" if latent else "images"), (0,)
        with atomic_write(self.out) as new, zipfile.ZipFile(new, "w") as archive:
            archive.comment = self.info.digest.encode()
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for stored in self.values():
                    values = stored if latent else stored.transpose(0, 2, 3, 1)
                    values = values.repeat(3, axis=3) if adm and values.shape[3] == 1 else values
                    if shape == (0,):
                        shape = (len(positions), *values.shape[1:])
                        _write_npy_header(member, values.dtype, shape)
                    member.write(np.ascontiguousarray(values).data)
                if shape == (0,):
                    _write_npy_header(member, np.dtype(np.float32 if latent else np.uint8), (0, 0, 0, 0))
            for column, numbers in columns.items():
                with archive.open(f"{column}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(numbers, np.int64), allow_pickle=False)

    def _read_digest(self) -> str | None:
        try:
            with zipfile.ZipFile(self.out) as archive:
                return archive.comment.decode("ascii", "replace")
        except (OSError, ValueError, zipfile.BadZipFile):
            return None


def _read_values(part: Path) -> Any:
    """Returns the samples of a part."""
    with np.load(part, allow_pickle=False) as file:
        return file["values"]


def _write_npy_header(file: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """Writes the header of an .npy whose values follow in parts."""
    describe = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": describe, "fortran_order": False, "shape": shape})
