"""What is in a data set: which of its files are images, which are left out and why, and the classes of the images."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edmdistill.data.files import Files, Member, as_dataset_error, require_readable
from edmdistill.errors import DatasetError, printable

IMAGE_SUFFIXES = (".png", ".bmp", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif")
LATENT_SUFFIX = ".npy"
OTHER_IMAGES = (
    *(".tif", ".tiff", ".gif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".dds", ".ico", ".dib", ".pcx"),
    *(".jp2", ".j2k", ".jpx", ".jxl", ".heic", ".heif", ".avif", ".exr", ".hdr", ".psd", ".svg", ".dng", ".qoi"),
)
"""Images by name, which are not read: refused, so that no part of a set is lost."""
LABELS = "dataset.json"
OURS = {"grid.png": "grid of samples", "samples.json": "record of samples"}
"""What `edmdistill sample` leaves beside its images: no part of a set, and not worth a note."""
JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "__pycache__"}
"""What systems leave beside a user's files, names in lower case."""
MOST_CLASSES = 100_000
"""A class is a vector of as many numbers; the largest data sets in use have about 22,000 classes."""


@dataclass(frozen=True)
class Contents:
    """What is in a data set.

    Attributes:
        images: sorted by name.
        left_out: the reason for every other file, by name.
        latent: whether the images are latents.
        labels: the class of each image, int64 [N], or None.
        label_names: the name of each class, or None.
        absent: names in dataset.json of files that are not there.
    """

    images: Sequence[Member]
    left_out: dict[str, str]
    latent: bool
    labels: NDArray[np.int64] | None
    label_names: list[str] | None
    absent: Sequence[str] = ()

    def notes(self, name: str) -> list[str]:
        """Sentences on what was left out of the set that is called so."""
        notes = []
        left_out = {file: reason for file, reason in self.left_out.items() if reason not in OURS.values()}
        if left_out:
            count = len(left_out)
            notes.append(f"{name}: left out {count:,} file{'s' if count > 1 else ''}: {summarize(left_out)}.")
        if self.absent:
            count = len(self.absent)
            notes.append(
                f"{name}: {LABELS} labels {count:,} file{'s that are' if count > 1 else ' that is'} not there, "
                f"the first {printable(self.absent[0])}."
            )
        return notes


def read_contents(files: Files) -> Contents:
    """Reads what is in a zip or a folder in EDM's layout: images or latents, in subfolders or not, and a dataset.json.

    Names in dataset.json are relative to its own folder, or else to the set; backslashes are slashes, and accents match
    however they are encoded.
    Raises: DatasetError: no images; a file that cannot be read, that is there twice, or is an image of another kind;
        dataset.json broken, incomplete or ambiguous.
    """
    path = files.path
    members = sorted(files.members(), key=lambda member: member.name)
    numbered = {folder for folder, _, name in (_key(m.name).rpartition("/") for m in members) if _is_sample(name)}
    images, others, left_out, described = [], [], {}, []
    for member in members:
        key = _key(member.name)
        folder, _, name = key.rpartition("/")
        if reason := _junk(key):
            left_out[member.name] = reason
        elif name.lower() == LABELS:
            described.append(member)
        elif name in OURS and folder in numbered:
            left_out[member.name] = OURS[name]
        elif name.lower().endswith((*IMAGE_SUFFIXES, LATENT_SUFFIX)):
            images.append(member)
        elif name.lower().endswith(OTHER_IMAGES):
            others.append(member.name)
        else:
            left_out[member.name] = "not an image"
    if others:
        count = f"{len(others):,} images of kinds that are" if len(others) > 1 else "an image of a kind that is"
        raise DatasetError(
            f"{path} holds {count} not read, the first {printable(others[0])}; convert to PNG, or move elsewhere"
        )
    if not images:
        instead = f" (left out: {summarize(left_out)})" if left_out else ""
        raise DatasetError(
            f"{path} holds no images{instead}; expected files that end in {', '.join((*IMAGE_SUFFIXES, LATENT_SUFFIX))}"
        )
    latents = [member for member in images if member.name.lower().endswith(LATENT_SUFFIX)]
    if 0 < len(latents) < len(images):
        image = next(member for member in images if not member.name.lower().endswith(LATENT_SUFFIX))
        raise DatasetError(
            f"{path} holds {len(latents)} latents, the first {printable(latents[0].name)}, among {len(images)} files, "
            f"the first image {printable(image.name)}; keep images and latents in two data sets"
        )
    if len(described) > 1:
        first, second = (printable(member.name) for member in described[:2])
        raise DatasetError(f"{path} holds two descriptions, {first} and {second}; give one data set of the two")
    by_key = _unique(path, images)
    require_readable(path, [*images, *described])
    if not described:
        return Contents(images, left_out, bool(latents), None, None)
    labels, names, absent = _read_labels(files, described[0], images, by_key, {_key(name) for name in left_out})
    return Contents(images, left_out, bool(latents), labels, names, absent)


def summarize(left_out: dict[str, str]) -> str:
    """hidden (.a/b.png), not an image (notes.txt and 2 more)"""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(
        f"{reason} ({printable(names[0])}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''})"
        for reason, names in by_reason.items()
    )


def _key(name: str) -> str:
    """A name as it is compared: composed accents, slashes, no leading dot or slash."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    name = name.replace("\\", "/")
    if name.startswith(("/", ".")) or "//" in name or "/./" in name:
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def _is_sample(name: str) -> bool:
    """Whether `edmdistill sample` calls its images so: 000000.png for seed 0."""
    stem = name.removesuffix(".png")
    return stem != name and len(stem) >= 6 and stem.isascii() and stem.isdecimal()


def _junk(key: str) -> str | None:
    parts = key.lower().replace("\r", "").split("/")
    if (key.startswith(".") or "/." in key) and any(part.startswith(".") and part != ".." for part in parts):
        return "hidden"
    return None if JUNK.isdisjoint(parts) else "system file"


def _unique(path: object, images: Sequence[Member]) -> dict[str, Member]:
    """The images by what their names are compared by.  Raises: DatasetError: two are the same."""
    found: dict[str, Member] = {}
    for member in images:
        other = found.setdefault(_key(member.name), member)
        if other is not member:
            twice = other.name == member.name
            names = printable(ascii(other.name)), printable(ascii(member.name))
            raise DatasetError(
                f"{path} holds {printable(member.name)} twice, of {other.size:,} and {member.size:,} bytes; keep one"
                if twice
                else f"{path} holds {names[0]} and {names[1]}, which are one name; rename or remove one"
            )
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key twice."""
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"it has {twice[0]!r} twice")
    return dict(pairs)


def _read_labels(
    files: Files, described: Member, images: Sequence[Member], by_key: dict[str, Member], left_out: set[str]
) -> tuple[NDArray[np.int64] | None, list[str] | None, list[str]]:
    """The classes of the images, the classes' names, and the labelled files that are not there."""
    where = f"{files.path}: {printable(described.name)}"
    form = '{"labels": [[file, class], ...]}'
    with as_dataset_error(lambda why: f"{where} is not {form} ({why}); mend or remove it"):
        document = json.loads(files.read(described.name), object_pairs_hook=_object)
        if not isinstance(document, dict) or "labels" not in document:
            raise ValueError("it has no labels")
        entries = document["labels"]
        pairs = list(entries.items()) if isinstance(entries, dict) else [(file, label) for file, label in entries or []]
        names = document.get("label_names")
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(n, str) and n.strip() and n.isprintable() for n in names)
    ):
        raise DatasetError(f"{where}: label_names is no list of printable names; list one for each class, from 0")
    if entries is None:
        return None, names, []
    top = posixpath.dirname(_key(described.name))
    known: dict[str, tuple[str, Any]] = {}
    absent = []
    for file, label in pairs:
        if not isinstance(file, str):
            raise DatasetError(f"{where} labels {printable(repr(file))[:100]}, which is no file's name; mend it")
        inside, whole = posixpath.join(top, _key(file)), _key(file)
        here = [name for name in dict.fromkeys((inside, whole)) if name in by_key]
        if len(here) == 2:
            raise DatasetError(
                f"{where} labels {printable(file)}, which may be {printable(here[0])} or {printable(here[1])}; name it "
                "from the set's top folder"
            )
        if not here:
            if inside not in left_out:
                absent.append(file)
            continue
        if here[0] in known:
            other, its = known[here[0]]
            also = "" if other == file else f", as {printable(ascii(other))} and {printable(ascii(file))}"
            raise DatasetError(
                f"{where} labels {printable(here[0])} twice{also}, with {_short(its)} and {_short(label)}; keep one"
            )
        known[here[0]] = file, label
    missing = [member.name for member in images if _key(member.name) not in known]
    if missing:
        instead = f" (it labels {printable(absent[0])}, which is not there)" if absent else ""
        raise DatasetError(
            f"{where} has no label for {len(missing):,} of {len(images):,} images, the first {printable(missing[0])}"
            f"{instead}; label all or none"
        )
    most = min(len(names), MOST_CLASSES) if names else MOST_CLASSES
    for file, label in known.values():
        if type(label) is not int or label < 0:
            raise DatasetError(f"{where} labels {printable(file)} as {_short(label)}; classes are integers from 0")
        if label >= most:
            limit = f"label_names has {most} names" if names else f"at most {most:,} classes are read"
            raise DatasetError(
                f"{where} labels {printable(file)} as {_short(label)}, but {limit}; classes are integers from 0"
            )
    return np.array([known[_key(member.name)][1] for member in images], dtype=np.int64), names, absent


def _short(label: object) -> str:
    if type(label) is int and label.bit_length() > 128:
        return f"an integer of {label.bit_length()} bits"
    text = printable(repr(label))
    return text if len(text) <= 50 else f"{text[:50]}..."
