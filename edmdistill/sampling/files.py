"""Writes samples as they are drawn: a folder of PNGs, a grid as one PNG, or an .npz.

Samples are stored at once, together with their request: the same request continues where it stopped, and samples of
another one are never mixed with them. One process draws into an output at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from edmdistill import __version__
from edmdistill.atomic import atomic_write, lock_folder, remove_leftovers
from edmdistill.errors import CheckpointError, EdmDistillError, NotFiniteError, counted
from edmdistill.sampling.decode import Decoder
from edmdistill.sampling.generate import describe_not_finite, not_finite
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.output import MAX_GRID, Layout, SampleInfo
from edmdistill.sampling.png_folder import REQUEST, PngFolder
from edmdistill.sampling.seeds import format_seeds, parse_seeds
from edmdistill.sampling.single_file import GridFile, NpzFile

FILE_KINDS = {".npz": NpzFile, ".png": GridFile}
"""Outputs that are one file, by suffix; any other name that has no suffix of a file format is a folder."""
DIGITS = 6
"""Of a number in a sentence on other samples."""
FORMAT_SUFFIX = re.compile(r"\.(?!v[0-9]+$)[a-z][a-z0-9]*")
"""A suffix of a file format: samples.pt is meant to be a file, run.v2 and frogs-2.5 are not."""


def check_output(out: Path, *, latent: bool = False, layout: Layout = "edmdistill") -> None:
    """Checks the output of a command before its work starts.

    Args:
        latent: latents are kept.
    Raises: EdmDistillError: the format is not supported, or does not hold what is asked for, or a file or folder is in
        the way.
    """
    suffix = out.suffix.lower()
    if latent and suffix != ".npz":
        raise EdmDistillError(f"{out}: --latents go into an .npz: use a file name that ends in .npz")
    if layout == "adm" and (latent or suffix != ".npz"):
        reason = "holds images, not latents: leave out --latents" if latent else "is that of an .npz: name one"
        raise EdmDistillError(f"{out}: --layout adm {reason}, or leave out --layout")
    if FORMAT_SUFFIX.fullmatch(suffix) and suffix not in FILE_KINDS and not out.is_dir():
        raise EdmDistillError(
            f"{out}: {out.suffix} is not supported; use a file name that ends in .npz or .png (a grid), or a folder "
            "without a suffix"
        )
    if out.exists() and out.is_dir() == (suffix in FILE_KINDS):
        existing, output = ("folder", "file") if out.is_dir() else ("file", "folder")
        raise EdmDistillError(f"{out} is a {existing}, but a {output} is to be written: choose another name")


def shown_count(out: Path, count: int) -> int:
    """Returns how many of so many samples an output shows: a grid has its limit."""
    return min(count, MAX_GRID) if out.suffix.lower() == ".png" else count


class Samples:
    """The samples of one request, stored as they are drawn.

        NAME.npz: see NpzFile
        NAME.png: a grid, see GridFile
        NAME: see PngFolder, with a grid beside it; samples.json is the record of the request

    Samples that are not finite are counted and left out. The output is locked against other processes from `claim` on,
    or from now on if some are stored, until it is complete, or `close`. A folder of other seeds, or an unfinished file,
    grows to these where it holds some of them, drawn in the same way.

    Args:
        out: the output, see check_output.
        request: all that decides the samples, as JSON.
        count: the number N of samples.
        seeds: of each sample, or None if they are known only after all are drawn.  [N]
        classes: of each sample, or None.  [N]
        decoder: from samples to pictures; None: they are latents of a VAE, and kept as they are.
        layout: of an .npz.
        label_names: of all classes, for dataset.json.
        source: where the network comes from, for the record.
        overwrite: replace samples of another request.
    Attributes:
        missing: positions of the samples that are not drawn yet, ascending.
        broken: positions of those that are not finite, ascending.
        finished: whether there is nothing left to do.
    Raises: EdmDistillError: the output holds other samples, or other files, or another process draws into it.
        CheckpointError: it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        count: int,
        seeds: Sequence[int] | None,
        classes: Sequence[int] | None,
        *,
        decoder: Decoder | None = to_uint8,
        layout: Layout = "edmdistill",
        label_names: Sequence[str] | None = None,
        source: str = "",
        overwrite: bool = False,
    ) -> None:
        options = {"latents": True} if decoder is None else {"layout": layout} if layout != "edmdistill" else {}
        self.request = json.loads(json.dumps({**request, **options}))  # as read back from the file: tuples are lists
        digest = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        kind = FILE_KINDS.get(out.suffix.lower(), PngFolder)
        self.output = kind(out, SampleInfo(digest, classes, label_names, decoder is None, layout))
        self.decoder = decoder
        self.count, self.seeds, self.source = count, seeds, source
        self.broken: list[int] = []
        self._started, self._overwrite = False, overwrite
        self._unlock: Callable[[], object] | None = None
        self._made: list[Path] = []
        try:
            self.finished = self._open(overwrite)
        except BaseException:
            self.close()
            raise
        if self.finished or not self.output.folder.exists():  # it held others' samples, and was removed
            self.close()
        skip = {*self.output.drawn, *self.broken}
        self.missing = [] if self.finished else [position for position in range(count) if position not in skip]

    @property
    def description(self) -> str:
        """How many samples there are, of which kind."""
        if self.output.info.latent:
            return f"{counted(self.count, 'latent')} of a VAE, undecoded"
        return counted(self.count, "image")

    @property
    def progress(self) -> str:
        """A sentence on how many samples are stored."""
        if self.seeds is None:
            return "nothing was written, because rejection chooses after all images are drawn"
        output = self.output
        if not output.drawn:
            return f"nothing of {output.out} was drawn yet"
        return f"{len(output.drawn):,} of {self.count:,} images are kept in {output.folder}; the same command continues"

    def claim(self) -> None:
        """Makes the folder that holds the samples, and locks it against other processes, before the work begins.

        Raises: EdmDistillError: another process draws into it, or has just.  CheckpointError: it cannot be made.
        """
        if self._unlock is not None:
            return
        folder = Path(os.path.realpath(self.output.folder))  # a link may lead to a folder that is not there yet
        self._made = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made: {error.strerror or error}") from error
        self._lock()
        if self.output.is_complete(self._overwrite) or read_request(folder) is not None:
            raise EdmDistillError(
                f"another process has just drawn into {self.output.out}: run this command again, or choose another path"
            )

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
            self.broken = sorted([*self.broken, *(positions[i] for i in broken.nonzero().flatten().tolist())])
            self._write_record()
        if good:
            values = images[~broken]
            values = values if self.decoder is None else self.decoder(values)
            self.output.put({positions[i]: seeds[i] for i in good}, values)

    def finish(self) -> None:
        """Writes what needs all samples: the grid, the classes, the .npz.

        Raises: CheckpointError: they cannot be written.
        """
        self._start()
        self.output.finish()
        self._write_record(complete=True)
        self.output.close()
        self.finished = True
        self.close()

    def close(self) -> None:
        """Lets other processes draw into the output; folders in which nothing was stored are removed again."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()  # unless it holds something
        self._made = []
        if self._unlock is not None:
            self._unlock()
        self._unlock = None

    def require_finite(self) -> None:
        """Raises NotFiniteError, which names their seeds, if samples are not finite."""
        if self.broken:
            seeds = [(self.seeds or range(self.count))[position] for position in self.broken]
            raise NotFiniteError(f"{self.output.out}: {describe_not_finite(seeds, self.count)}; the others are written")

    def _open(self, overwrite: bool) -> bool:
        """Reads what is stored, and returns whether it is complete.  Removes only leftovers and overwritten samples."""
        output = self.output
        if output.folder.is_dir():
            self._lock()
        if output.is_complete(overwrite):
            return True
        record = read_request(output.folder)
        if record is None:
            output.claim(overwrite)
            return False
        if record["request"] != self.request:
            stored = self._stored_seeds(record["request"])
            if stored is not None and self._holds(stored, record["request"].get("classes")):
                remove_leftovers(output.folder)
                places = {seed: place for place, seed in enumerate(self.seeds or ())}
                self.broken = sorted(places[seed] for i, seed in enumerate(stored) if i in record["not_finite"])
                output.recover(self.seeds)
                old = set(stored)
                output.drawn = {place: seed for place, seed in output.drawn.items() if seed in old}
                return False
            if not overwrite:
                differs = _difference(record["request"], self.request)
                if record.get("source") not in (None, self.source):  # it may be another commit of the same repository
                    differs = f"of {record['source']}, {differs}"
                raise EdmDistillError(
                    f"{output.folder} holds other samples ({differs}): choose another path, or add --overwrite"
                    f"{self._advice(stored)}"
                )
            output.clear()
            return False
        remove_leftovers(output.folder)
        self.broken = list(record["not_finite"])
        output.recover(self.seeds)
        every = self.seeds is None or len({*output.drawn, *self.broken}) == self.count
        return bool(record["complete"]) and every

    def _stored_seeds(self, request: Mapping[str, Any]) -> list[int] | None:
        """Returns the seeds of a stored request that differs from this one in them alone."""
        if self.seeds is None or {**request, "seeds": 0} != {**self.request, "seeds": 0}:
            return None
        try:
            return parse_seeds(str(request.get("seeds")))
        except EdmDistillError:  # it was changed by hand
            return None

    def _holds(self, stored: Sequence[int], cycle: object) -> bool:
        """Returns whether these samples are the stored ones, in the same classes, and others.

        Args:
            stored: their seeds.
            cycle: the classes in which they take turns; no list: classes depend on the seeds alone.
        """
        places, classes = {seed: place for place, seed in enumerate(self.seeds or ())}, self.output.info.classes
        if not places.keys() >= set(stored):
            return False
        if not isinstance(cycle, list) or classes is None:
            return True
        return all(classes[places[seed]] == cycle[i % len(cycle)] for i, seed in enumerate(stored))

    def _advice(self, stored: Sequence[int] | None) -> str:
        """Returns how to add these samples to the stored ones of other seeds; empty: they cannot be added."""
        old = dict.fromkeys(stored or ())
        more = [seed for seed in self.seeds or () if seed not in old]
        every = format_seeds([*old, *more])
        return f"; --seeds {every} adds to them" if stored and more and len(every) <= 80 else ""

    def _start(self) -> None:
        if not self._started:
            self.claim()
            self._write_record()
            self.output.start(self.seeds)
        self._started = True

    def _lock(self) -> None:
        descriptor = lock_folder(self.output.folder)
        if descriptor is None:
            raise EdmDistillError(
                f"another process is drawing into {self.output.out}: wait for it, or choose another path"
            )
        self._unlock = weakref.finalize(self, os.close, descriptor)

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
        with atomic_write(self.output.folder / REQUEST) as new:
            new.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


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
    stored, requested = _flat(stored), _flat(requested)
    keys = [key for key in {**stored, **requested} if stored.get(key) != requested.get(key)]
    pairs = [(key, _shorten(stored.get(key)), _shorten(requested.get(key))) for key in keys]
    return ", ".join(
        f"{key} {there} there, {now} now" if there != now else f"{key} differs beyond {DIGITS} digits"
        for key, there, now in pairs
    )


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a request with what its tables hold beside them, so that only values which differ are named."""
    tables = [value for value in request.values() if isinstance(value, dict)]
    return {key: value for part in (request, *tables) for key, value in part.items() if not isinstance(value, dict)}


def _shorten(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, list | tuple) and all(isinstance(entry, float) for entry in value):
        text = f"[{', '.join(map(_shorten, value))}]"
    return text if len(text) <= 40 else f"{text[:37]}..."
