"""Names of classes and licences that a checkpoint does not state, from its data set or its digest."""

from __future__ import annotations

import re
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

from edmdistill.checkpoints.nvidia import OfficialCheckpoint
from edmdistill.embedded import ASSETS, EMBEDDED

DATA_SETS = {
    "imagenet": (
        1000,
        re.compile(r"imagenet|ilsvrc|(?<![a-z0-9])(img|in)-?(1k|32|64|128|256|512)(?!\d)", re.IGNORECASE),
    ),
    "cifar10": (10, re.compile(r"cifar-?10(?!\d)", re.IGNORECASE)),
}
"""Number of classes, and how the data set is recognized by a path or file name; its classes are in assets."""


class KnownFile(NamedTuple):
    """What is known of a file with a certain sha256."""

    licence: str
    label_names: tuple[str, ...]


KNOWN_FILES = {embedded.teacher_sha256: KnownFile("apache-2.0", embedded.label_names) for embedded in EMBEDDED.values()}
"""By sha256: the teachers in assets."""


@cache
def dataset_class_names(data_set: str) -> tuple[str, ...]:
    """Returns the names of a data set's classes in their order; data_set is a key of DATA_SETS."""
    return _lines(f"classes-{data_set}.txt")


@cache
def imagenet_synsets() -> dict[str, str]:
    """Returns the names of ImageNet's classes in their order by synset, as its folders are called: n01440764."""
    return dict(zip(_lines("synsets-imagenet.txt"), dataset_class_names("imagenet"), strict=True))


def _lines(asset: str) -> tuple[str, ...]:
    lines = (ASSETS / asset).read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def class_names(label_dim: int, *paths: object) -> tuple[str, ...] | None:
    """Returns the names of a network's classes; None where its data set is not known.

    Args:
        label_dim: number of classes.
        paths: of the data set, or names of files named after it; anything but a string is ignored.
    """
    ends = ["/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:]) for path in paths if isinstance(path, str)]
    for data_set, (count, pattern) in DATA_SETS.items():
        if count == label_dim and any(map(pattern.search, ends)):
            return dataset_class_names(data_set)
    return None


def official_class_names(official: OfficialCheckpoint) -> list[str] | None:
    """Returns the class names of an official network, by its digest, its file name or the data set that it records."""
    if official.sha256 in KNOWN_FILES:
        return list(KNOWN_FILES[official.sha256].label_names)
    data = [(official.dataset or {}).get(name) for name in ("path", "name")]
    count = official.arguments.get("label_dim")
    # The file was renamed and records no data set: all of NVIDIA's with 1,000 classes are ImageNet's.
    guess = "imagenet" if count == 1000 and not any(data) else None
    names = class_names(count if isinstance(count, int) else 0, official.path.name, *data, guess)
    return None if names is None else list(names)
