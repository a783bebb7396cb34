"""Writes samples as they are drawn: a folder of PNGs, a grid as one PNG, or an .npz.

Samples are stored at once, together with their request: the same request continues where it stopped, and samples of
another one are never mixed with them.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from edmdistill import __version__
from edmdistill.atomic import atomic_write, remove_leftovers
from edmdistill.errors import CheckpointError, EdmDistillError, NotFiniteError
from edmdistill.sampling.generate import describe_not_finite, not_finite
from edmdistill.sampling.grid import image_grid, to_image, to_uint8

FILE_SUFFIXES = ".npz", ".png"
"""Suffixes of outputs that are one file; any other name that has no suffix of a file format is a folder."""
FORMAT_SUFFIX = re.compile(r"\.(?!v[0-9]+$)[a-z][a-z0-9]*")
"""A suffix of a file format: samples.pt is meant to be a file, run.v2 and frogs-2.5 are not."""
REQUEST, LABELS, GRID = "samples.json", "dataset.json", "grid.png"
DIGEST_KEY = "edmdistill"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of a complete PNG."""
MAX_GRID = 1024  # samples
NO_CLASS = -1  # the class of an unconditional sample in an .npz


def check_output(out: Path, *, latent: bool) -> None:
    """Checks the output of a command before its work starts.

    Raises: EdmDistillError: the format is not supported, latents cannot be pictures, or a file or folder is in the way.
    """
    suffix = out.suffix.lower()
    if latent and suffix != ".npz":
        raise EdmDistillError(
            f"{out}: this network makes VAE latents, which are not pictures until they are decoded; "
            "use a file name that ends in .npz"
        )
    if FORMAT_SUFFIX.fullmatch(suffix) and suffix not in FILE_SUFFIXES and not out.is_dir():
        raise EdmDistillError(
            f"{out}: {out.suffix} is not supported; use a file name that ends in .npz or .png (a grid), or a folder "
            "without a suffix"
        )
    if out.exists() and out.is_dir() == (suffix in FILE_SUFFIXES):
        existing, output = ("folder", "file") if out.is_dir() else ("file", "folder")
        raise EdmDistillError(f"{out} is a {existing}, but a {output} is to be written: choose another name")


class Samples:
    """The samples of one request, stored as they are drawn.

        NAME.npz: images uint8 [N,H,W,C] (or latents float32 [N,C,H,W]), seeds and labels int64 [N], -1 = no class
        NAME.png: a grid
        NAME: a folder with 000000.png for seed 0 ..., grid.png, dataset.json with the classes, and samples.json

    Until a file is complete, its parts are in a hidden folder beside it. Samples that are not finite are counted and
    left out. A grid shows the first 1024 samples, with a row for each class if there are two or more samples of a class
    on average.

    Args:
        out: the output, see check_output.
        request: all that decides the samples, as JSON.
        count: the number N of samples.
        seeds: of each sample, or None if they are known only after all are drawn.  [N]
        classes: of each sample, or None.  [N]
        latent: the samples are latents of a VAE.
        label_names: of all classes, for dataset.json.
        source: where the network comes from, for the record.
        overwrite: replace samples of another request.
    Attributes:
        missing: positions of the samples that are not drawn yet, ascending.
        broken: positions of those that are not finite.
        finished: whether there is nothing left to do.
    Raises: EdmDistillError: the output holds other samples, or other files.  CheckpointError: it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        count: int,
        seeds: Sequence[int] | None,
        classes: Sequence[int] | None,
        *,
        latent: bool = False,
        label_names: Sequence[str] | None = None,
        source: str = "",
        overwrite: bool = False,
    ) -> None:
        self.out, self.count, self.seeds, self.classes = out, count, seeds, classes
        self.request = json.loads(json.dumps(request))  # as read back from the file: tuples are lists
        self.latent, self.label_names, self.source = latent, label_names, source
        self.digest = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        self.suffix = out.suffix.lower() if out.suffix.lower() in FILE_SUFFIXES else ""
        self.folder = out.parent / f".{out.name}.parts" if self.suffix else out
        self.broken: list[int] = []
        self._started = False
        self._drawn: dict[int, int] = {}  # seeds by position
        self.finished = self._open(overwrite)
        skip = {*self._drawn, *self.broken}
        self.missing = [] if self.finished else [position for position in range(count) if position not in skip]

    @property
    def progress(self) -> str:
        """A sentence on how many samples are stored."""
        if self.seeds is None:
            return "nothing was written, because rejection chooses after all images are drawn"
        if not self._drawn:
            return f"nothing of {self.out} was drawn yet"
        return f"{len(self._drawn):,} of {self.count:,} images are kept in {self.folder}; the same command continues"

    def batches(self, size: int) -> Iterator[list[int]]:
        """Yields the missing positions, in consecutive runs of at most `size`."""
        for _, run in groupby(enumerate(self.missing), lambda pair: pair[1] - pair[0]):
            positions = [position for _, position in run]
            yield from (positions[at : at + size] for at in range(0, len(positions), size))

    def put(self, positions: Sequence[int], images: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Stores samples.

        Args:
            positions: of the samples, ascending.  [B]
            images: as `sample` returns them.  [B,C,H,W]
            seeds: if they were not known before.  [B]
        Raises: CheckpointError: they cannot be written.
        """
        self._start()
        if seeds is None:
            assert self.seeds is not None
            seeds = [self.seeds[position] for position in positions]
        else:
            self.seeds = seeds
        broken = not_finite(images)
        good = (~broken).nonzero().flatten().tolist()
        if len(good) < len(images):
            self.broken += [positions[i] for i in broken.nonzero().flatten().tolist()]
            self._write_record()
        new_seeds = {positions[i]: seeds[i] for i in good}
        values = images[~broken] if self.latent else to_uint8(images[~broken])
        if self.suffix and new_seeds:
            with atomic_write(self.folder / f"{positions[0]:08d}.npz") as new, new.open("wb") as file:
                np.savez(
                    file, values=values.numpy(), positions=np.array([*new_seeds]), seeds=np.array([*new_seeds.values()])
                )
        else:
            for seed, pixels in zip(new_seeds.values(), values, strict=True):
                _save_without_fsync(to_image(pixels), self.out / _name(seed))
        self._drawn |= new_seeds

    def finish(self) -> None:
        """Writes what needs all samples: the grid, the classes, the .npz.

        Raises: CheckpointError: they cannot be written.
        """
        self._start()
        positions = sorted(self._drawn)
        if self.suffix == ".npz":
            self._write_npz(positions)
        elif positions:
            self._write_grid(positions[:MAX_GRID])
        if self.suffix:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._write_labels(positions)
            self._write_record(complete=True)
        self.finished = True

    def require_finite(self) -> None:
        """Raises NotFiniteError, which names their seeds, if samples are not finite."""
        if self.broken:
            seeds = [(self.seeds or range(self.count))[position] for position in self.broken]
            raise NotFiniteError(f"{self.out}: {describe_not_finite(seeds, self.count)}; the others are written")

    def _open(self, overwrite: bool) -> bool:
        """Reads what is stored, and returns whether it is complete.  Removes only leftovers and overwritten samples."""
        if self.suffix and self.out.exists():
            if _read_digest(self.out) == self.digest:
                shutil.rmtree(self.folder, ignore_errors=True)  # left by a kill just after the file was complete
                remove_leftovers(self.out.parent, self.out.name)
                return True
            if not overwrite:
                raise EdmDistillError(f"{self.out} already exists: choose another name, or add --overwrite")
        record = read_request(self.folder)
        if record is None:
            if self.suffix:
                shutil.rmtree(self.folder, ignore_errors=True)  # killed before its request was written, or after
            elif self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise EdmDistillError(
                    f"{self.folder} holds files that edmdistill sample did not write: choose another folder"
                )
            return False
        if record["request"] != self.request:
            if not overwrite:
                differs = _difference(record["request"], self.request)
                raise EdmDistillError(
                    f"{self.folder} holds other samples ({differs}): choose another path, or add --overwrite"
                )
            self._clear()
            return False
        remove_leftovers(self.folder)
        for leftover in self.folder.glob(".*.png.*.new"):
            leftover.unlink(missing_ok=True)
        self.broken = list(record["not_finite"])
        if self.suffix:
            self._read_parts()
        elif self.seeds is None:
            return bool(record["complete"])
        else:
            names = {entry.name for entry in self.folder.iterdir()}
            listed = (i for i, seed in enumerate(self.seeds) if _name(seed) in names)
            self._drawn = {i: self.seeds[i] for i in listed if _is_complete(self.folder / _name(self.seeds[i]))}
        return bool(record["complete"]) and len({*self._drawn, *self.broken}) == self.count

    def _clear(self) -> None:
        """Removes the samples of another request, and nothing else."""
        if self.suffix:
            shutil.rmtree(self.folder)
            return
        for entry in self.folder.iterdir():
            if re.fullmatch(r"[0-9]{6,}\.png", entry.name) or entry.name in (LABELS, GRID, REQUEST):
                entry.unlink()

    def _start(self) -> None:
        if not self._started:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder} cannot be made: {error.strerror or error}.") from error
            self._write_record()
            if not self.suffix and self.seeds is not None:
                self._write_labels(range(self.count), self.seeds)
        self._started = True

    def _write_record(self, complete: bool = False) -> None:
        document = {
            "schema_version": 1,
            "edmdistill": __version__,
            "source": self.source,
            "request": self.request,
            "count": self.count,
            "complete": complete,
            "not_finite": self.broken,
        }
        with atomic_write(self.folder / REQUEST) as new:
            new.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npz"))

    def _read_parts(self) -> None:
        for part in self._parts():
            try:
                with np.load(part, allow_pickle=False) as file:
                    self._drawn |= dict(zip(file["positions"].tolist(), file["seeds"].tolist(), strict=True))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                part.unlink()  # torn by a power failure: its samples are drawn again

    def _write_npz(self, positions: Sequence[int]) -> None:
        labels = [NO_CLASS if self.classes is None else self.classes[position] for position in positions]
        columns = {"seeds": [self._drawn[position] for position in positions], "labels": labels}
        name, shape = ("latents" if self.latent else "images"), (0,)
        with atomic_write(self.out) as new, zipfile.ZipFile(new, "w") as archive:
            archive.comment = self.digest.encode()
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for part in self._parts():
                    with np.load(part, allow_pickle=False) as file:
                        values = file["values"] if self.latent else file["values"].transpose(0, 2, 3, 1)
                    if shape == (0,):
                        shape = (len(positions), *values.shape[1:])
                        _write_npy_header(member, values.dtype, shape)
                    member.write(np.ascontiguousarray(values).data)
                if shape == (0,):
                    _write_npy_header(member, np.dtype(np.float32 if self.latent else np.uint8), (0, 0, 0, 0))
            for column, numbers in columns.items():
                with archive.open(f"{column}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(numbers, np.int64), allow_pickle=False)

    def _write_grid(self, positions: Sequence[int]) -> None:
        shown = None if self.classes is None else [self.classes[position] for position in positions]
        rows = shown if shown is not None and 2 * len(set(shown)) <= len(shown) else None
        about = PngImagePlugin.PngInfo()
        about.add_text(DIGEST_KEY, self.digest)
        with atomic_write(self.out if self.suffix else self.out / GRID) as new:
            image_grid(self._pixels(positions), labels=rows).save(new, "png", pnginfo=about)

    def _pixels(self, positions: Sequence[int]) -> Tensor:
        """Returns stored samples.  uint8 [N,C,H,W]"""
        if not self.suffix:
            pictures = [_read_pixels(self.out / _name(self._drawn[position])) for position in positions]
            return torch.from_numpy(np.stack(pictures))
        pixels: list[Any] = []
        for part in self._parts():
            with np.load(part, allow_pickle=False) as file:
                pixels.extend(file["values"])
            if len(pixels) >= len(positions):
                break
        return torch.from_numpy(np.stack(pixels[: len(positions)]))

    def _write_labels(self, positions: Sequence[int], seeds: Sequence[int] | None = None) -> None:
        """Writes a dataset.json as EDM has it, which makes the folder a data set."""
        if self.classes is None:
            return
        seed_of = self._drawn if seeds is None else dict(enumerate(seeds))
        document: dict[str, Any] = {"labels": [[_name(seed_of[i]), self.classes[i]] for i in positions]}
        if self.label_names is not None:
            document["label_names"] = list(self.label_names)
        with atomic_write(self.out / LABELS) as new:
            new.write_text(json.dumps(document) + "\n", encoding="utf-8")


def read_request(folder: Path) -> dict[str, Any] | None:
    """Returns the samples.json that `sample` wrote in a folder, or None: request, count, complete and not_finite."""
    try:
        document = json.loads((folder / REQUEST).read_bytes())
        good = isinstance(document["request"], dict) and isinstance(document["not_finite"], list)
        return document if good and isinstance(document["complete"], bool) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def unfinished_samples(folder: Path) -> str | None:
    """Returns a sentence on a folder of samples that is incomplete, or None."""
    record = read_request(folder)
    if record is None or record["complete"]:
        return None
    return f"{folder} is incomplete: not all of its {record['count']:,} images are drawn; run its sample command again"


def _difference(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Returns what differs between two requests, in words."""
    keys = [key for key in {**stored, **requested} if stored.get(key) != requested.get(key)]
    return ", ".join(f"{key} {_shorten(stored.get(key))} there, {_shorten(requested.get(key))} now" for key in keys)


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(PNG_END), 0))
        return file.read() == PNG_END


def _read_pixels(path: Path) -> Any:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_digest(path: Path) -> str | None:
    """Returns the digest of the request that a file was written for."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode("ascii", "replace")
        with Image.open(path) as image:
            return str(image.info.get(DIGEST_KEY))
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile):
        return None


def _write_npy_header(file: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """Writes the header of an .npy whose values follow in parts."""
    describe = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": describe, "fortran_order": False, "shape": shape})
