"""The sources of pictures that `data prepare` reads, each as one table: names in their order, classes, and bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from edmdistill.checkpoints.class_names import imagenet_synsets
from edmdistill.data import cifar10, mnist, parquet
from edmdistill.data.contents import LABELS, by_canonical_name, missing_samples, sort_files, summarize, unfinished
from edmdistill.data.files import (
    Files,
    FolderFiles,
    ZipFiles,
    canonical_name,
    inner_path,
    open_files,
    require_readable,
    status_of,
)
from edmdistill.data.labels import Labels, are_numbered, read_labels, top_folder
from edmdistill.data.pictures import REFUSED, SUFFIXES, Pictures
from edmdistill.data.tar_files import TarFiles, decompress, is_compressed, is_tar
from edmdistill.errors import DatasetError, counted, did_you_mean, printable

EXPECTED = (
    "give a folder, a zip or a tar of pictures, CIFAR-10's archive, MNIST's train-images-idx3-ubyte.gz, or a .parquet"
)
LABEL_RULES = {
    "auto": "dataset.json, or else the top folders of a folder or tar, as the official tool does",
    "folders": "the top folders",
    "none": "no classes",
}
"""Where classes come from."""
TOP = "(no folder)"
"""The name of the class of the files that are in no folder."""


def open_pictures(
    path: Path,
    scratch: Path,
    *,
    labels: str = "auto",
    split: str = "train",
    most: int | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Pictures:
    """Returns the pictures of a source of any kind.

    Args:
        scratch: a folder where a compressed tar is unpacked to a plain one, unless that of the same tar is there.
        labels: a key of LABEL_RULES.
        split: train | test | validation, of CIFAR-10's archive and of a data set in parquet files.
        most: so many of them, the first, need classes in dataset.json; None: all.
        on_bytes: called with the number of bytes of a tar that were just searched for files, or unpacked.
    Raises: DatasetError: there is no such source, it is of another kind, damaged, or its classes are not clear.
    """
    if labels not in LABEL_RULES:
        raise DatasetError(f"the rule for labels {labels!r} is not known; {did_you_mean(labels, LABEL_RULES)}")
    changed = status_of(path, EXPECTED).st_ctime_ns
    if not os.access(path, os.R_OK):
        raise DatasetError(f"{path} may not be read by this user; change its permissions")
    folder = FolderFiles(path) if path.is_dir() else None
    pictures = _open(path, folder, scratch / f"source-{changed}.tar", labels, split, most, on_bytes)
    if split != "train" and split not in pictures.kind:
        raise DatasetError(f"{path} is one set, without splits; leave --split {split} out, or give another source")
    if not pictures.names:
        instead = f" (left out: {summarize(dict(pictures.left_out))})" if pictures.left_out else ""
        raise DatasetError(f"{path} holds no pictures{instead}; {EXPECTED}")
    return replace(pictures, changed=changed if folder is None else folder.changed)


def _open(
    path: Path,
    folder: FolderFiles | None,
    unpacked: Path,
    labels: str,
    split: str,
    most: int | None,
    on_bytes: Callable[[int], object],
) -> Pictures:
    if folder is not None:
        files: Files = folder
    elif mnist.is_images(path):
        return mnist.open_mnist(path, labels)
    elif parquet.is_parquet(path):
        return parquet.open_parquet([path], path, labels, split)
    elif path.is_file() and is_tar(path):
        files = TarFiles(path, on_bytes=on_bytes)
        if is_compressed(path):
            if not unpacked.exists():
                for other in unpacked.parent.glob("source-*.tar"):  # as it was before it was changed
                    other.unlink()
                decompress(path, unpacked, on_bytes)
            files = TarFiles(path, unpacked)
    elif path.is_file() and not _starts_as_zip(path):
        raise DatasetError(f"{path} is none of the sources that are read; {EXPECTED}")
    else:
        files = open_files(path, EXPECTED)
    names = [member.name for member in files.members()]
    if cifar10.batches(names, split):
        return cifar10.open_cifar10(files, names, labels, split)
    if folder is not None and (parts := parquet.find_parts(path, names)):
        return parquet.open_parquet(parts, path, labels, split)
    return open_picture_files(files, labels, most)


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def open_picture_files(files: Files, rule: str, most: int | None = None) -> Pictures:
    """Returns the pictures of a folder, a zip or a tar, with classes by a rule of LABEL_RULES.

    Args:
        most: see `open_pictures`.
    """
    images, documents, left_out = sort_files(files, SUFFIXES, REFUSED)
    left_out |= getattr(files, "left_out", {})
    by_name = by_canonical_name(files.path, images)
    document = next((member for member in documents if canonical_name(member.name).lower() == LABELS), None)
    require_readable(files.path, [*images, *([document] if document else [])])
    names = [member.name for member in images]
    labeled, notes = Labels(), list[str]()
    if missing := missing_samples(files, left_out, len(images)):
        notes.append(unfinished(str(files.path), missing))
    if rule == "auto" and document is None and documents:
        first = printable(documents[0].name)
        notes.append(f"{first} is not read, because it is not at the top of the source; prepare its folder alone")
    if rule == "auto" and document is not None:
        wanted = dict(islice(by_name.items(), most))
        others = {canonical_name(name) for name in left_out} | by_name.keys() - wanted.keys()
        labeled = read_labels(files, document, wanted, others)
        if labeled.absent:
            first = printable(labeled.absent[0])
            count = len(labeled.absent)
            absent = f"{counted(count, 'file')} that {'are' if count > 1 else 'is'} not there"
            notes.append(f"{LABELS} labels {absent}, the first {first}")
    if rule == "folders" or (rule == "auto" and labeled.classes is None):
        labeled, more = _classes_of_folders([*map(inner_path, names)], rule, isinstance(files, ZipFiles))
        notes += more
    # One handle of a zip counts its readers without a lock.
    lock = threading.Lock()

    def read(i: int) -> bytes:
        if not isinstance(files, ZipFiles):
            return files.read(names[i])
        with lock:
            return files.read(names[i])

    kind = {FolderFiles: "folder", ZipFiles: "zip", TarFiles: "tar"}[type(files)]
    sizes = [member.size for member in images]
    return Pictures(kind, names, sizes, read, labeled.classes, labeled.names, left_out, notes)


def _classes_of_folders(names: Sequence[str], rule: str, is_zip: bool) -> tuple[Labels, list[str]]:
    """Returns the top folders as classes, in the order of their names, and notes on them.

    Without `folders`, one folder is no class, and a zip has none, as in the official tool.
    """
    tops = [*map(top_folder, names)]
    classes = {top: label for label, top in enumerate(sorted(set(tops)))}
    numbered = are_numbered(classes)
    inner = {"/".join(name.split("/")[:2]) for name in names if name.count("/") > 1}
    if rule == "auto" and not is_zip and len(classes) == 1 and len(inner) > 1:
        top = printable(next(iter(classes)))
        return Labels(), [
            f"all pictures are in one folder, {top}, so they have no classes; prepare that folder, and its "
            f"{len(inner):,} folders are classes"
        ]
    if rule == "auto" and (is_zip or len(classes) < 2):
        note = f"a zip without {LABELS} has no classes; --labels folders makes its {len(classes):,} top folders classes"
        return Labels(), [note] if len(classes) > 1 and not numbered else []
    synsets = imagenet_synsets()
    titles = [printable(synsets.get(top, top)).strip() or TOP for top in classes]
    notes = []
    if numbered:
        notes.append(f"the folders {titles[0]}, ... are classes here, but they may only be numbered; --labels none")
    if len(classes) > 1 and "" in classes:
        notes.append(f"what is in no folder is class 0: {counted(tops.count(''), 'picture')}")
    return Labels(np.array([classes[top] for top in tops], np.int64), titles), notes
