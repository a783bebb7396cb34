"""Reads the contents of a data set: which files are images, which are left out and why, and the images' classes."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edmdistill.data.decode import is_grid
from edmdistill.data.files import BROKEN_LINK, Files, Member, as_dataset_error, canonical_name, require_readable
from edmdistill.data.labels import Labels, read_labels
from edmdistill.errors import DatasetError, counted, printable

IMAGE_SUFFIXES = (".png", ".bmp", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif")
LATENT_SUFFIX = ".npy"
UNREAD_SUFFIXES = (
    *(".tif", ".tiff", ".gif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".dds", ".ico", ".dib", ".pcx"),
    *(".jp2", ".j2k", ".jpx", ".jxl", ".heic", ".heif", ".avif", ".exr", ".hdr", ".psd", ".svg", ".dng", ".qoi"),
)
"""Image formats that are not read: refused, so that no part of a set is lost silently."""
LABELS = "dataset.json"
GRID = "-grid.png"
"""Ending of the grid that `edmdistill sample` draws beside a folder of its samples, after the folder's name."""
SAMPLES = {"samples.json": "record of samples"}
"""What `edmdistill sample` writes beside its images: left out without a note."""
JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "__pycache__"}
"""Files that operating systems leave beside a user's files, in lower case."""


@dataclass(frozen=True)
class Contents:
    """The contents of a data set.

    Attributes:
        images: sorted by name.
        left_out: the reason for every other file, by name.
        latent: whether the images are latents.
        labels: what dataset.json says.
        missing: how many images `edmdistill sample` has still to draw into it, as far as its record says.
    """

    images: Sequence[Member]
    left_out: dict[str, str]
    latent: bool
    labels: Labels
    missing: int

    def notes(self, name: str) -> list[str]:
        """Returns sentences on what was left out of the set of this name."""
        notes = []
        left_out = {file: reason for file, reason in self.left_out.items() if reason not in SAMPLES.values()}
        if left_out:
            count = len(left_out)
            notes.append(f"{name}: left out {counted(count, 'file')}: {summarize(left_out)}.")
        if absent := self.labels.absent:
            count = len(absent)
            notes.append(
                f"{name}: {LABELS} labels {counted(count, 'file')} that {'are' if count > 1 else 'is'} not there, "
                f"the first {printable(absent[0])}."
            )
        if self.missing:
            notes.append(unfinished(name, self.missing))
        return notes


def unfinished(name: str, missing: int) -> str:
    """Returns a sentence on a set of this name into which `edmdistill sample` has still to draw so many images."""
    return f"{name}: {counted(missing, 'image')} of its `edmdistill sample` are not drawn yet; run that command again."


def missing_samples(files: Files, left_out: Mapping[str, str], images: int) -> int:
    """Returns how many images the record of `edmdistill sample` among these files misses, 0 without one.

    Args:
        images: that are there.
    """
    record = next((name for name, reason in left_out.items() if reason in SAMPLES.values()), None)
    if record is None:
        return 0
    with suppress(DatasetError), as_dataset_error(str):
        document = json.loads(files.read(record))
        if document["complete"] is False:
            return max(int(document["count"]) - images, 1)
    return 0


def read_contents(files: Files) -> Contents:
    """Returns what is in a zip or a folder in EDM's layout: images or latents, in any subfolders, and a dataset.json.

    Raises: DatasetError: no images; a file that cannot be read, that is there twice, or is an image of another kind;
        dataset.json broken, incomplete or ambiguous; see `read_labels`.
    """
    path = files.path
    advice = "convert them to PNG, as `edmdistill data prepare` does with most"
    images, documents, left_out = sort_files(files, (*IMAGE_SUFFIXES, LATENT_SUFFIX), UNREAD_SUFFIXES, advice)
    if not images:
        instead = f" (left out: {summarize(left_out)})" if left_out else ""
        raise DatasetError(
            f"{path} holds no images{instead}; expected files that end in {', '.join((*IMAGE_SUFFIXES, LATENT_SUFFIX))}"
        )
    latent = _require_one_kind(path, images)
    if len(documents) > 1:
        first, second = (printable(member.name) for member in documents[:2])
        raise DatasetError(
            f"{path} holds two label files, {first} and {second}; keep one, or split the data set in two"
        )
    by_name = by_canonical_name(path, images)
    require_readable(path, images)
    ignored = {canonical_name(name) for name in left_out}
    labels = read_labels(files, documents[0], by_name, ignored) if documents else Labels()
    return Contents(images, left_out, latent, labels, missing_samples(files, left_out, len(images)))


def sort_files(
    files: Files, suffixes: tuple[str, ...], refused: tuple[str, ...], advice: str = "convert them to PNG"
) -> tuple[list[Member], list[Member], dict[str, str]]:
    """Returns the images by name, the dataset.json files, and the reason why each other file is left out.

    Args:
        suffixes, refused: of images that are read, and of those that are not.
        advice: on these.
    Raises: DatasetError: an image of a kind that is not read.
    """
    members = sorted(files.members(), key=lambda member: member.name)
    names = [canonical_name(member.name) for member in members]
    images, documents, unread, left_out = [], [], [], {}
    for member, name in zip(members, names, strict=True):
        base = posixpath.basename(name)
        if reason := _junk(name):
            left_out[member.name] = reason
        elif base.lower() == LABELS:
            documents.append(member)
        elif base in SAMPLES:
            left_out[member.name] = SAMPLES[base]
        elif base.endswith(GRID) and _is_grid_of_folder(files, member.name, names):
            left_out[member.name] = "a grid of samples"
        elif base.lower().endswith(suffixes):
            images.append(member)
        elif base.lower().endswith(refused):
            unread.append(member.name)
        else:
            left_out[member.name] = BROKEN_LINK if member.problem == f"is {BROKEN_LINK}" else "not an image"
    if unread:
        count = f"{len(unread):,} images in formats that are" if len(unread) > 1 else "an image in a format that is"
        raise DatasetError(
            f"{files.path} holds {count} not supported, the first {printable(unread[0])}; {advice}, or move them "
            "elsewhere"
        )
    return images, documents, left_out


def _is_grid_of_folder(files: Files, name: str, names: Sequence[str]) -> bool:
    """Returns whether a file is a grid beside the samples that it shows.

    Args:
        names: of all files, canonical.
    """
    folder = canonical_name(name).removesuffix(GRID) + "/"
    with suppress(DatasetError), as_dataset_error(str):
        return any(other.startswith(folder) for other in names) and is_grid(files.read(name))
    return False


def _require_one_kind(path: Path, images: Sequence[Member]) -> bool:
    """Returns whether the files are latents.  Raises: DatasetError: some are latents, others images."""
    latents = [member for member in images if member.name.lower().endswith(LATENT_SUFFIX)]
    if 0 < len(latents) < len(images):
        image = next(member for member in images if not member.name.lower().endswith(LATENT_SUFFIX))
        raise DatasetError(
            f"{path} holds {counted(len(latents), 'latent')}, the first {printable(latents[0].name)}, among "
            f"{counted(len(images), 'file')}, the first image {printable(image.name)}; keep images and latents in two "
            "data sets"
        )
    return bool(latents)


def summarize(left_out: dict[str, str]) -> str:
    """Returns the reasons with an example each: hidden (.a/b.png), not an image (notes.txt and 2 more)."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(
        f"{reason} ({printable(names[0])}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''})"
        for reason, names in by_reason.items()
    )


def _junk(key: str) -> str | None:
    """Returns why a file is no part of any data set, or None."""
    parts = key.lower().split("/")
    if (key.startswith(".") or "/." in key) and any(part.startswith(".") and part != ".." for part in parts):
        return "hidden"
    return None if JUNK.isdisjoint(parts) else "system file"


def by_canonical_name(path: Path, images: Sequence[Member]) -> dict[str, Member]:
    """Returns images by canonical name, in their order.  Raises: DatasetError: two have the same."""
    by_name: dict[str, Member] = {}
    for member in images:
        other = by_name.setdefault(canonical_name(member.name), member)
        if other is not member:
            names = printable(ascii(other.name)), printable(ascii(member.name))
            raise DatasetError(
                f"{path} holds {printable(member.name)} twice, of {other.size:,} and {member.size:,} bytes; keep one"
                if other.name == member.name
                else f"{path} holds {names[0]} and {names[1]}, which differ only in case or Unicode form; rename or "
                "remove one"
            )
    return by_name
