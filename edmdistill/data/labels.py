"""Reads dataset.json: the class of each image, and the names of the classes."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edmdistill.checkpoints.encoder import Encoding
from edmdistill.data.files import Files, Member, as_dataset_error, canonical_name, inner_path
from edmdistill.errors import DatasetError, counted, printable

MAX_CLASSES = 100_000
"""A class is a vector of as many numbers; the largest data sets in use have about 22,000 classes."""
FORM = '{"labels": [[file, class], ...]}'
_NUMBERED = re.compile(r"\d{5}")


class Labels(NamedTuple):
    """The classes of a data set.

    Attributes:
        classes: of each image, int64 [N], or None.
        names: of each class, or None.
        absent: labeled files that are not there.
        encoding: how latents were made, or None.
        prepared: how `data prepare` made images, as it is written, or None.
    """

    classes: NDArray[np.int64] | None = None
    names: list[str] | None = None
    absent: Sequence[str] = ()
    encoding: Encoding | None = None
    prepared: dict[str, Any] | None = None


def top_folder(name: str) -> str:
    """Returns the first folder of a file's path inside its set; empty for one that is in none."""
    return inner_path(name).rpartition("/")[0].partition("/")[0]


def are_numbered(folders: Iterable[str]) -> bool:
    """Returns whether all folders are called as those that EDM's tool fills one after another, 00000, 00001 ..."""
    return all(map(_NUMBERED.fullmatch, folders))


def class_folders(names: Iterable[str]) -> int:
    """Returns the number of top folders of files that may be classes; 0 for one folder, or where they are numbered."""
    folders = {top_folder(name) for name in names}
    return 0 if len(folders) < 2 or are_numbered(folders) else len(folders)


def read_labels(files: Files, document: Member, images: Mapping[str, Member], left_out: Set[str]) -> Labels:
    """Returns the classes that a dataset.json gives to images.

    Names in it are relative to its own folder, or else to the set; they are compared as `canonical_name` has them.

    Args:
        document: the dataset.json.
        images: all images in their order, by canonical name.
        left_out: canonical names of files that are no images, whose labels are ignored.
    Raises: DatasetError: it is broken, incomplete or ambiguous.
    """
    where = f"{files.path}: {printable(document.name)}"
    entries, labels_read = _parse(files, document, where)
    if entries is None:
        return labels_read
    folder = posixpath.dirname(canonical_name(document.name))
    labels, absent = _match(entries, folder, images, left_out, where)
    unlabeled = [member.name for key, member in images.items() if key not in labels]
    if unlabeled:
        example = f" (it labels {printable(absent[0])}, which is not there)" if absent else ""
        raise DatasetError(
            f"{where} has no label for {len(unlabeled):,} of {len(images):,} images, the first "
            f"{printable(unlabeled[0])}{example}; label all or none"
        )
    for file, label in labels.values():
        _require_class(label, labels_read.names, f"{where} labels {printable(file)} as {_short(label)}")
    return labels_read._replace(classes=np.array([labels[key][1] for key in images], dtype=np.int64), absent=absent)


def _parse(files: Files, document: Member, where: str) -> tuple[list[tuple[Any, Any]] | None, Labels]:
    """Returns the pairs of a file and its label, None where there are none, and what else the file says."""
    with as_dataset_error(lambda why: f"{where} is not {FORM} ({why}); fix or remove it"):
        content = json.loads(files.read(document.name), object_pairs_hook=_object)
        if not isinstance(content, dict) or "labels" not in content:
            raise ValueError("it has no labels")
        labels, names = content["labels"], content.get("label_names")
        pairs = labels.items() if isinstance(labels, dict) else labels or []
        entries = [(file, label) for file, label in pairs]
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(n, str) and n.strip() and n.isprintable() for n in names)
    ):
        raise DatasetError(f"{where}: label_names must be a list of printable names, one for each class")
    with as_dataset_error(
        lambda why: f"{where}: encoder does not say how latents were made ({why}); encode them again"
    ):
        encoding = None if content.get("encoder") is None else msgspec.convert(content["encoder"], Encoding)
    prepared = content.get("prepared")
    parsed = Labels(names=names, encoding=encoding, prepared=prepared if isinstance(prepared, dict) else None)
    return entries or None, parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object.  Raises: ValueError: a key occurs twice."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"it has {repeated[0]!r} twice")
    return dict(pairs)


def _match(
    entries: Sequence[tuple[Any, Any]], folder: str, images: Mapping[str, Member], left_out: Set[str], where: str
) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Returns the file as dataset.json names it and the label, by canonical name of the image; and files not there."""
    matched: dict[str, tuple[str, Any]] = {}
    absent = []
    for file, label in entries:
        if not isinstance(file, str):
            raise DatasetError(f"{where} labels {printable(repr(file))[:100]}, which is no file's name; fix it")
        name = canonical_name(file)
        inside = posixpath.join(folder, name)
        keys = [key for key in dict.fromkeys((inside, name)) if key in images]
        if len(keys) == 2:
            raise DatasetError(
                f"{where} labels {printable(file)}, which may be {printable(keys[0])} or {printable(keys[1])}; write "
                "its path from the top folder of the data set"
            )
        if not keys:
            if inside not in left_out:
                absent.append(file)
            continue
        if keys[0] in matched:
            other, other_label = matched[keys[0]]
            names = "" if other == file else f", as {printable(ascii(other))} and {printable(ascii(file))}"
            raise DatasetError(
                f"{where} labels {printable(keys[0])} twice{names}, with {_short(other_label)} and {_short(label)}; "
                "keep one"
            )
        matched[keys[0]] = file, label
    return matched, absent


def _require_class(label: object, names: Sequence[str] | None, sentence: str) -> None:
    if type(label) is not int or label < 0:
        raise DatasetError(f"{sentence}; classes are integers from 0")
    if label >= min(len(names or range(MAX_CLASSES)), MAX_CLASSES):
        few = names and len(names) <= MAX_CLASSES
        limit = (
            f"label_names has {counted(len(names or ()), 'name')}"
            if few
            else f"at most {MAX_CLASSES:,} classes are read"
        )
        raise DatasetError(f"{sentence}, but {limit}; classes are integers from 0")


def _short(label: object) -> str:
    if type(label) is int and label.bit_length() > 128:
        return f"an integer of {label.bit_length()} bits"
    text = printable(repr(label))
    return text if len(text) <= 50 else f"{text[:50]}..."
