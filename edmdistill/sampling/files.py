"""Where samples go, as they are drawn: a folder of PNGs, one PNG of them all, or an .npz.

What was drawn is kept at once, together with the request that it answers: the same request goes on where it stopped,
and another one does not mix with it.
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

FILES = ".npz", ".png"
"""Suffixes of what is written as one file; any other name without a suffix that means a format is a folder's."""
FORMAT = re.compile(r"\.(?!v[0-9]+$)[a-z][a-z0-9]*")
"""A suffix that looks like a file format's: samples.pt is meant to be a file, run.v2 and frogs-2.5 are not."""
REQUEST, LABELS, GRID = "samples.json", "dataset.json", "grid.png"
MARK = "edmdistill"
IEND = b"\0\0\0\0IEND\xaeB`\x82"
"""How a whole PNG ends."""
GRID_MOST = 1024  # samples in a grid
NO_CLASS = -1  # what stands in an .npz for the class of an unconditional sample


def check_output(out: Path, *, latent: bool) -> None:
    """Finds out before the work begins whether its result can be written.

    Raises: EdmDistillError: a format that is not written, latents as pictures, or a place that cannot be written.
    """
    suffix = out.suffix.lower()
    if latent and suffix != ".npz":
        raise EdmDistillError(
            f"{out}: this network makes VAE latents, which are not pictures until they are decoded; "
            "use a file name that ends in .npz"
        )
    if FORMAT.fullmatch(suffix) and suffix not in FILES and not out.is_dir():
        raise EdmDistillError(
            f"{out}: {out.suffix} is not supported; use a file name that ends in .npz or .png (a grid), or a folder "
            "without a suffix"
        )
    if out.exists() and out.is_dir() == (suffix in FILES):
        found, wanted = ("folder", "file") if out.is_dir() else ("file", "folder")
        raise EdmDistillError(f"{out} is a {found}, but a {wanted} is to be written: choose another name")


def read_image(path: Path, channels: int, resolution: int) -> Tensor:
    """One picture of a size, gray or RGB as asked.  [C,H,W] float32 in [-1, 1]

    Raises: EdmDistillError: it is no picture, or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise EdmDistillError(f"{path} cannot be read as a picture ({error}): give a PNG") from error
    if pixels.shape[:2] != (resolution, resolution):
        raise EdmDistillError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, but the network's images are {resolution}x{resolution}: "
            "resize it first"
        )
    return torch.from_numpy(pixels.reshape(resolution, resolution, channels)).permute(2, 0, 1) / 127.5 - 1


class Samples:
    """The samples of one request, kept as they are drawn.

        NAME.npz: images uint8 [N,H,W,C] (or latents float32 [N,C,H,W]), seeds and labels int64 [N], -1 = no class
        NAME.png: a grid
        NAME: a folder with 000000.png for seed 0 ..., grid.png, dataset.json with the classes, and samples.json

    Until a file is whole, its parts are in a hidden folder beside it. Samples that are not finite are left out
    everywhere, and counted. A grid shows the first 1024 samples, with a row for each class where they hold two or more
    of a class on average.

    Args:
        out: where to, as check_output has found it good.
        request: all that decides the pictures, as JSON has it.
        count: the number N of samples.
        seeds: of each sample, or None where they are known only when all are drawn.  [N]
        classes: of each sample, or None.  [N]
        latent: the samples are latents of a VAE.
        label_names: of all classes, for dataset.json.
        source: what is sampled, for the record.
        overwrite: samples of another request make way.
    Attributes:
        missing: positions of the samples that are not drawn yet, rising.
        broken: positions of those that are not finite.
        finished: whether there is nothing to do.
    Raises: EdmDistillError: other samples, or other files, are there.  CheckpointError: the disk refuses.
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
        self.request = json.loads(json.dumps(request))  # as it comes back from the file: tuples are lists
        self.latent, self.label_names, self.source = latent, label_names, source
        self.digest = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        self.kind = out.suffix.lower() if out.suffix.lower() in FILES else ""
        self.folder = out.parent / f".{out.name}.parts" if self.kind else out
        self.broken: list[int] = []
        self._began = False
        self._drawn: dict[int, int] = {}  # seeds by position
        self.finished = self._open(overwrite)
        skip = {*self._drawn, *self.broken}
        self.missing = [] if self.finished else [position for position in range(count) if position not in skip]

    @property
    def progress(self) -> str:
        """Says how many are kept."""
        if self.seeds is None:
            return "nothing was written, because rejection chooses after all images are drawn"
        if not self._drawn:
            return f"nothing of {self.out} was drawn yet"
        return f"{len(self._drawn):,} of {self.count:,} images are kept in {self.folder}; the same command goes on"

    def batches(self, size: int) -> Iterator[list[int]]:
        """The missing positions, in runs of at most `size`."""
        for _, run in groupby(enumerate(self.missing), lambda pair: pair[1] - pair[0]):
            positions = [position for _, position in run]
            yield from (positions[at : at + size] for at in range(0, len(positions), size))

    def put(self, positions: Sequence[int], images: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Keeps samples.

        Args:
            positions: where they belong, rising.  [B]
            images: as `sample` returns them.  [B,C,H,W]
            seeds: where they were not known before.  [B]
        Raises: CheckpointError: the disk refuses.
        """
        self._begin()
        if seeds is None:
            assert self.seeds is not None
            seeds = [self.seeds[position] for position in positions]
        else:
            self.seeds = seeds
        broken = not_finite(images)
        good = (~broken).nonzero().flatten().tolist()
        if len(good) < len(images):
            self.broken += [positions[i] for i in broken.nonzero().flatten().tolist()]
            self._note()
        own = {positions[i]: seeds[i] for i in good}
        values = images[~broken] if self.latent else to_uint8(images[~broken])
        if self.kind and own:
            with atomic_write(self.folder / f"{positions[0]:08d}.npz") as new, new.open("wb") as file:
                np.savez(file, values=values.numpy(), positions=np.array([*own]), seeds=np.array([*own.values()]))
        elif own:
            for seed, pixels in zip(own.values(), values, strict=True):
                _save_quickly(to_image(pixels), self.out / _name(seed))
        self._drawn |= own

    def finish(self) -> None:
        """Writes what takes all samples: the grid, the classes, the .npz.

        Raises: CheckpointError: the disk refuses.
        """
        self._begin()
        positions = sorted(self._drawn)
        if self.kind == ".npz":
            self._write_npz(positions)
        elif positions:
            self._write_grid(positions[:GRID_MOST])
        if self.kind:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._write_labels(positions)
            self._note(complete=True)
        self.finished = True

    def require_finite(self) -> None:
        """Raises NotFiniteError, which names their seeds, if samples are not finite."""
        if self.broken:
            seeds = [(self.seeds or range(self.count))[position] for position in self.broken]
            raise NotFiniteError(f"{self.out}: {describe_not_finite(seeds, self.count)}; the others are written")

    def _open(self, overwrite: bool) -> bool:
        """Finds out what is there, and whether it is all.  Nothing is changed unless it makes way."""
        if self.kind and self.out.exists():
            if _mark(self.out) == self.digest:
                shutil.rmtree(self.folder, ignore_errors=True)  # what a kill just after the file was whole left
                remove_leftovers(self.out.parent, self.out.name)
                return True
            if not overwrite:
                raise EdmDistillError(f"{self.out} already exists: choose another name, or add --overwrite")
        there = read_request(self.folder)
        if there is None:
            if self.kind:
                shutil.rmtree(self.folder, ignore_errors=True)  # killed before its request was there, or after
            elif self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise EdmDistillError(
                    f"{self.folder} holds files that edmdistill sample did not write: choose another folder"
                )
            return False
        if there["request"] != self.request:
            if not overwrite:
                differs = _difference(there["request"], self.request)
                raise EdmDistillError(
                    f"{self.folder} holds other samples ({differs}): choose another path, or add --overwrite"
                )
            self._clear()
            return False
        remove_leftovers(self.folder)
        for leftover in self.folder.glob(".*.png.*.new"):
            leftover.unlink(missing_ok=True)
        self.broken = list(there["not_finite"])
        if self.kind:
            self._read_parts()
        elif self.seeds is None:
            return bool(there["complete"])
        else:
            names = {entry.name for entry in self.folder.iterdir()}
            found = (i for i, seed in enumerate(self.seeds) if _name(seed) in names)
            self._drawn = {i: self.seeds[i] for i in found if _is_whole(self.folder / _name(self.seeds[i]))}
        return bool(there["complete"]) and len({*self._drawn, *self.broken}) == self.count

    def _clear(self) -> None:
        """Removes samples of another request, and nothing else."""
        if self.kind:
            shutil.rmtree(self.folder)
            return
        for entry in self.folder.iterdir():
            if re.fullmatch(r"[0-9]{6,}\.png", entry.name) or entry.name in (LABELS, GRID, REQUEST):
                entry.unlink()

    def _begin(self) -> None:
        if not self._began:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder} cannot be made: {error.strerror or error}.") from error
            self._note()
            if not self.kind and self.seeds is not None:
                self._write_labels(range(self.count), self.seeds)
        self._began = True

    def _note(self, complete: bool = False) -> None:
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
                part.unlink()  # torn by a power cut: it is drawn again

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
                        _header(member, values.dtype, shape)
                    member.write(np.ascontiguousarray(values).data)
                if shape == (0,):
                    _header(member, np.dtype(np.float32 if self.latent else np.uint8), (0, 0, 0, 0))
            for column, numbers in columns.items():
                with archive.open(f"{column}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(numbers, np.int64), allow_pickle=False)

    def _write_grid(self, positions: Sequence[int]) -> None:
        shown = None if self.classes is None else [self.classes[position] for position in positions]
        rows = shown if shown is not None and 2 * len(set(shown)) <= len(shown) else None
        about = PngImagePlugin.PngInfo()
        about.add_text(MARK, self.digest)
        with atomic_write(self.out if self.kind else self.out / GRID) as new:
            image_grid(self._pixels(positions), labels=rows).save(new, "png", pnginfo=about)

    def _pixels(self, positions: Sequence[int]) -> Tensor:
        """Samples that were kept, read back.  uint8 [N,C,H,W]"""
        if not self.kind:
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
        """dataset.json in EDM's form, which makes the folder a data set."""
        if self.classes is None:
            return
        known = self._drawn if seeds is None else dict(enumerate(seeds))
        document: dict[str, Any] = {"labels": [[_name(known[i]), self.classes[i]] for i in positions]}
        if self.label_names is not None:
            document["label_names"] = list(self.label_names)
        with atomic_write(self.out / LABELS) as new:
            new.write_text(json.dumps(document) + "\n", encoding="utf-8")


def read_request(folder: Path) -> dict[str, Any] | None:
    """What `sample` has noted in a folder, or None: `request`, `count`, `complete` and `not_finite`."""
    try:
        document = json.loads((folder / REQUEST).read_bytes())
        good = isinstance(document["request"], dict) and isinstance(document["not_finite"], list)
        return document if good and isinstance(document["complete"], bool) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def unfinished_samples(folder: Path) -> str | None:
    """A sentence on a folder of samples that `sample` has not finished, or None."""
    there = read_request(folder)
    if there is None or there["complete"]:
        return None
    return f"{folder} is unfinished: not all of its {there['count']:,} images are drawn; give its sample command again"


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs between two requests, in words."""
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} {_word(theirs.get(key))} there, {_word(ours.get(key))} now" for key in keys)


def _word(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _name(seed: int) -> str:
    return f"{seed:06d}.png"


def _save_quickly(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all, as far as a killed process goes.

    The disk is not waited for, which would take longer than many a network: after a power cut, `_is_whole` finds out.
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


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(IEND), 0))
        return file.read() == IEND


def _read_pixels(path: Path) -> Any:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _mark(path: Path) -> str | None:
    """The digest of the request that a file answers."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode("ascii", "replace")
        with Image.open(path) as image:
            return str(image.info.get(MARK))
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile):
        return None


def _header(file: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """The head of an .npy whose numbers follow in parts."""
    describe = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": describe, "fortran_order": False, "shape": shape})
