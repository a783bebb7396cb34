"""Describes a data set in numbers and words, for `data inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from edmdistill.data.contents import read_contents, summarize
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.files import open_files

SCHEMA_VERSION = 1
SHOWN = 12
"""Number of entries of a list that are shown before the rest is counted."""


class ClassCount(Struct, frozen=True, kw_only=True):
    """A class and its number of images."""

    label: int
    name: str | None
    images: int


class DataSummary(Struct, frozen=True, kw_only=True):
    """The contents of a data set.

    Attributes:
        images: the number of images.
        latent: whether they are latents of a VAE.
        resolution, channels: H = W and C.
        mean, std: of each channel: of pixels in [-1, 1], or of latents as drawn, mean + std eps, before the teacher's
            scale.  [C]
        std_all: of all channels about their common mean, to compare with a network's sigma_data.
        left_out: the reason why each file that is no part of the set was left out, by name.
        fingerprint: Dataset.fingerprint.
    """

    source: str
    split: str
    images: int
    latent: bool
    resolution: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    std_all: float
    classes: tuple[ClassCount, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    fingerprint: str
    schema_version: int = SCHEMA_VERSION


def inspect_data(
    source: str | Path,
    *,
    split: str = "train",
    batch: int = 256,
    on_progress: Callable[[int], object] | None = None,
) -> DataSummary:
    """Reads all of a data set, and returns its summary.

    Args:
        source, split: see `open_dataset`.
        on_progress: called with the number of images that have just been read.
    Raises: DatasetError: see `open_dataset`; or an image cannot be read.
    """
    data = open_dataset(source, split=split)
    mean, std, std_all = _moments(data, batch, on_progress)
    names = data.label_names or []
    classes = tuple(
        ClassCount(label=label, name=names[label] if label < len(names) else None, images=count)
        for label, count in enumerate(data.class_counts)
    )
    return DataSummary(
        source=data.name,
        split=split,
        images=len(data),
        latent=data.latent,
        resolution=data.img_resolution,
        channels=data.img_channels,
        mean=mean,
        std=std,
        std_all=std_all,
        classes=classes,
        left_out={} if data.name == "digits" else read_contents(open_files(Path(source))).left_out,
        notes=tuple(data.notes),
        fingerprint=data.fingerprint,
    )


def _moments(
    data: Dataset, batch: int, on_progress: Callable[[int], object] | None
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Returns mean and standard deviation by channel [C], and the standard deviation of all channels together."""
    total = torch.zeros(data.img_channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(data), batch):
        values = data.tensors(range(start, min(start + batch, len(data))))[0].double()
        drawn, spread = values.chunk(2, dim=1) if data.latent else (values, torch.zeros(()))
        total += drawn.sum((0, 2, 3))
        squares += (drawn.square() + spread.square()).sum((0, 2, 3))
        if on_progress is not None:
            on_progress(len(values))
    count = len(data) * data.img_resolution**2
    mean, square = total / count, squares / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    std_all = (square.mean() - mean.mean().square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist()), float(std_all)


def to_json(summary: DataSummary) -> str:
    """Returns the summary as a JSON document."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()


def to_text(data: DataSummary) -> str:
    """Returns the summary as lines of text."""
    shape = f"{data.resolution}x{data.resolution}, {data.channels} channel{'s' if data.channels > 1 else ''}"
    kind = "latents, means and standard deviations (float32)" if data.latent else _mode(data.channels)
    measured = "latents, before the teacher's scale" if data.latent else "pixels in [-1, 1]"
    missing = [entry for entry in data.classes if not entry.images]
    rows: list[tuple[str, Any]] = [
        ("data set", data.source if data.source != "digits" else f"digits ({data.split})"),
        ("images", f"{data.images:,}"),
        ("size", f"{shape}, {kind}"),
        ("mean", f"{_numbers(data.mean)}  ({measured})"),
        ("std", f"{_numbers(data.std)}  (all channels {data.std_all:.4g})"),
        ("classes", f"{len(data.classes):,}" if data.classes else "none"),
        ("missing", _shorten([_title(entry) for entry in missing]) if missing else "none"),
        ("left out", f"{len(data.left_out):,}: {summarize(data.left_out)}" if data.left_out else "nothing"),
        ("fingerprint", data.fingerprint),
    ]
    if not data.classes:
        rows = [row for row in rows if row[0] != "missing"]
    lines = [f"{name:<12} {value}" for name, value in rows]
    if data.classes:
        lines += ["", f"{'class':<40} {'images':>10}"]
        lines += [f"{_title(entry):<40} {entry.images:>10,}" for entry in data.classes[: 10 * SHOWN]]
        rest = len(data.classes) - 10 * SHOWN
        lines += [f"... and {rest:,} more classes; --json lists all"] if rest > 0 else []
    notes = [note for note in data.notes if "left out" not in note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _mode(channels: int) -> str:
    return "8-bit grayscale" if channels == 1 else "8-bit RGB"


def _title(entry: ClassCount) -> str:
    return f"{entry.label}" if entry.name is None else f"{entry.label} {entry.name}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _shorten(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")
