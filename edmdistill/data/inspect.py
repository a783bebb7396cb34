"""Describes a data set in numbers and words, for `data inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import msgspec
import torch
from msgspec import Struct

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.encoder import UNRECORDED, ChannelStatistics, latent_encoder
from edmdistill.checkpoints.load import read_teacher
from edmdistill.data.contents import read_contents, summarize
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.encode import far_off
from edmdistill.data.files import open_files
from edmdistill.data.fit import require_fit
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import DatasetError, counted, printable

SCHEMA_VERSION = 1
SHOWN = 12
"""Number of entries of a list that are shown before the rest is counted."""


class ClassCount(Struct, frozen=True, kw_only=True):
    """A class and its number of images."""

    label: int
    name: str | None
    images: int


class Declared(Struct, frozen=True, kw_only=True):
    """Mean and standard deviation of latents as the teacher, or else the data set, declares them.

    Attributes:
        by: who declares them.
        mean, std: of each channel, before the teacher's scale.  [C]
        far_off: whether those that were measured differ much; see `far_off`.
    """

    by: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    far_off: bool


class DataSummary(Struct, frozen=True, kw_only=True):
    """The contents of a data set.

    Attributes:
        images: the number of images.
        latent: whether they are latents of a VAE.
        resolution, channels: H = W and C.
        mean, std: of each channel: of pixels in [-1, 1], or of latents as drawn, mean + std eps, before the teacher's
            scale.  [C]
        std_all: of all channels about their common mean, to compare with a network's sigma_data.
        teacher: the network that they are compared with, or None.
        misfit: why that one does not take them, or None.
        declared: of latents, what they are compared with, by channel; None where nothing is declared for them.
        turned: the number of images that EXIF data would turn; they are read as stored, as by NVIDIA's code.
        left_out: the reason why each file that is no part of the set was left out, by name.
        prepared: how `data prepare` made the images, or None.
        fingerprint: Dataset.fingerprint.
        credit: of an embedded set, the origin, authors and licence of its images.
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
    teacher: str | None
    misfit: str | None
    declared: Declared | None
    turned: int
    left_out: dict[str, str]
    prepared: dict[str, Any] | None
    notes: tuple[str, ...]
    fingerprint: str
    credit: str | None = None
    schema_version: int = SCHEMA_VERSION


def inspect_data(
    source: str | Path,
    *,
    split: str = "train",
    teacher: str | Path | None = None,
    batch: int = 256,
    on_progress: Callable[[int], object] = lambda count: None,
) -> DataSummary:
    """Reads all of a data set, and returns its summary.

    Args:
        source, split: see `open_dataset`.
        teacher: a network for which the data are meant, whose classes and statistics they are compared with.
        on_progress: called with the number of images that have just been read.
    Raises: DatasetError: see `open_dataset`; or an image cannot be read.  CheckpointError: the teacher cannot be read.
    """
    data = open_dataset(source, split=split)
    config, misfit = (None, None) if teacher is None else _compare(data, teacher)
    mean, std, std_all = _moments(data, batch, on_progress)
    embedded = EMBEDDED.get(data.name)
    names = data.label_names or []
    hint = data.folders_to_classes  # a teacher takes the set as it is, or its misfit says this
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
        teacher=None if teacher is None else str(teacher),
        misfit=misfit,
        declared=_declared(data, config, ChannelStatistics(mean, std)),
        turned=len(data.turned),
        left_out={} if embedded else read_contents(open_files(Path(source))).left_out,
        prepared=None if data.prepared is None else dict(data.prepared),
        notes=(*data.notes, *([f"{data.name} has no classes; {hint}."] if hint and teacher is None else [])),
        fingerprint=data.fingerprint,
        credit=embedded.credit if embedded else None,
    )


def _compare(data: Dataset, teacher: str | Path) -> tuple[CheckpointConfig, str | None]:
    """Returns the configuration of a teacher, and why it does not take the data, or None."""
    flow, config = read_teacher(teacher)
    try:
        require_fit(data, flow, config)
    except DatasetError as error:
        return config, str(error)
    return config, None


def _declared(data: Dataset, config: CheckpointConfig | None, measured: ChannelStatistics) -> Declared | None:
    """Returns what the teacher, or else the data set, declares of latents."""
    encoder = None if config is None else latent_encoder(config.encoder)
    if not data.latent:
        return None
    if config is not None and encoder is not None and len(encoder.scale) == data.img_channels:
        std = tuple(config.sigma_data / scale for scale in encoder.scale)
        mean = tuple(-bias / scale for bias, scale in zip(encoder.bias, encoder.scale, strict=True))
        by = "the teacher"
    elif data.encoding is not None:
        mean, std = tuple(data.encoding.raw_mean), tuple(data.encoding.raw_std)
        by = "EDM2, for a set that declares none" if data.encoding is UNRECORDED else "dataset.json"
    else:
        return None
    return Declared(by=by, mean=mean, std=std, far_off=far_off(measured, ChannelStatistics(mean, std)))


def _moments(
    data: Dataset, batch: int, on_progress: Callable[[int], object]
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Returns mean and standard deviation by channel [C], and the standard deviation of all channels together."""
    total = torch.zeros(data.img_channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(data), batch):
        values = data.tensors(range(start, min(start + batch, len(data))))[0].double()
        drawn, spread = values.chunk(2, dim=1) if data.latent else (values, torch.zeros(()))
        total += drawn.sum((0, 2, 3))
        squares += (drawn.square() + spread.square()).sum((0, 2, 3))
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
    shape = f"{data.resolution}x{data.resolution}, {counted(data.channels, 'channel')}"
    kind = "latents, means and standard deviations (float32)" if data.latent else _mode(data.channels)
    measured = "latents, before the teacher's scale" if data.latent else "pixels in [-1, 1]"
    missing = [entry for entry in data.classes if not entry.images]
    rows: list[tuple[str, Any]] = [
        ("data set", f"{data.source} ({data.split})" if data.credit else data.source),
        *([("credit", data.credit)] if data.credit else []),
        ("images", f"{data.images:,}"),
        ("size", f"{shape}, {kind}"),
        ("mean", f"{_numbers(data.mean)}  ({measured})"),
        ("std", f"{_numbers(data.std)}  (all channels {data.std_all:.4g})"),
        *([] if data.teacher is None else [("teacher", data.misfit or f"{data.teacher} takes these data")]),
        *_declared_rows(data.declared),
        *_prepared_rows(data.prepared),
        ("classes", f"{len(data.classes):,}" if data.classes else "none"),
        ("missing", _shorten([_title(entry) for entry in missing]) if missing else "none"),
        *([("turned", f"{data.turned:,} by EXIF, which is ignored, as by NVIDIA's code")] if data.turned else []),
        ("left out", f"{len(data.left_out):,}: {summarize(data.left_out)}" if data.left_out else "nothing"),
        ("fingerprint", data.fingerprint),
    ]
    if not data.classes:
        rows = [row for row in rows if row[0] != "missing"]
    lines = [f"{name:<12} {value}" for name, value in rows]
    if data.classes:
        titles = [_title(entry) for entry in data.classes[: 10 * SHOWN]]
        width = max(40, *map(len, titles))
        lines += ["", f"{'class':<{width}} {'images':>10}"]
        lines += [f"{title:<{width}} {entry.images:>10,}" for title, entry in zip(titles, data.classes, strict=False)]
        rest = len(data.classes) - 10 * SHOWN
        lines += [f"... and {rest:,} more classes; --json lists all"] if rest > 0 else []
    notes = [note for note in data.notes if not note.startswith(f"{data.source}: left out ")]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _declared_rows(declared: Declared | None) -> list[tuple[str, str]]:
    if declared is None:
        return []
    far = "; what was measured is far off: another VAE, range or scale" if declared.far_off else ""
    numbers = f"mean {_numbers(declared.mean)}; std {_numbers(declared.std)}"
    return [("declared", f"{numbers}  (by {declared.by}{far})")]


def _prepared_rows(prepared: dict[str, Any] | None) -> list[tuple[str, str]]:
    if prepared is None:
        return []
    words = [f"{key} {prepared[key]}" for key in ("source", "transform", "filter") if key in prepared]
    changes = prepared.get("changes")
    changed = [f"{count}: {change}" for change, count in changes.items()] if isinstance(changes, dict) else []
    rows = [("prepared", ", ".join(words)), *(("changed", change) for change in changed[:SHOWN])]
    return [(name, printable(value)[:200]) for name, value in rows]


def _mode(channels: int) -> str:
    return "8-bit grayscale" if channels == 1 else "8-bit RGB"


def _title(entry: ClassCount) -> str:
    name = "" if entry.name is None else f" {shorten(entry.name, 66, placeholder='...')}"
    return f"{entry.label}{name}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _shorten(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")
