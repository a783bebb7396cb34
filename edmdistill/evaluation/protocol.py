"""Evaluation: images against a reference, in numbers that carry with them how they were made.

A protocol says everything that moves a metric besides the images. A result holds the protocol that it was measured by,
with the hashes of the weights and of the reference; two results compare only where their protocols are equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict, replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import DatasetError, EdmDistillError, NotFiniteError, without_secrets
from edmdistill.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from edmdistill.evaluation.images import Images, Scheme, drawn, found
from edmdistill.features.spaces import FEATURES, Classifier
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.generate import generate_images, require_finite
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerRecord, SamplerSpec

SCHEMA_VERSION = 1


class Reference(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The real images, by file name. The measurement adds their number, and the sha256 of their size and pixels."""

    source: str
    split: str = "train"
    n: int | None = None
    sha256: str | None = None


class Likelihood(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a likelihood is computed, see evaluation.likelihood."""

    probes: int
    tolerance: float
    """Of the solver, relative and absolute."""
    sigma_min: float
    sigma_max: float
    rho: float = 7.0
    """The solver's time is sigma^(1/rho)."""
    solver: Literal["rk45"] = "rk45"
    steps: Literal["by image"] = "by image"
    divergence: Literal["Rademacher, fixed"] = "Rademacher, fixed"
    prior: Literal["N(0, sigma_max^2)"] = "N(0, sigma_max^2)"
    dequantisation: Literal["uniform, centred"] = "uniform, centred"


class Protocol(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What moves a metric besides the images: in PROTOCOLS the standard, in a result what was done, with all hashes.

    What is None plays no part in the measurement.
    """

    name: str
    metrics: tuple[str, ...]
    features: str | None
    """The feature space, a key of FEATURES."""
    features_sha256: str | None = None
    """Of its weights."""
    reference: Reference | None = None
    """In a standard, None allows any."""
    n: int = 5000
    seeds: str | None = "0-4999"
    """None: unknown, or nothing is drawn."""
    labels: Scheme = "balanced"
    """See Images.scheme."""
    uint8: str | None = "clip(127.5 x + 128, 0, 255), cut"
    resize: Literal["none"] = "none"
    covariance: Literal["unbiased"] | None = "unbiased"
    """Divided by n - 1, as numpy.cov does."""
    likelihood: Likelihood | UnsetType = UNSET
    """Not there where none is computed."""

    def sha256(self) -> str:
        """Of everything above: equal for results that may be compared."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


PROTOCOLS = {
    "digits": Protocol(
        name="digits",
        metrics=("fd_digits", "class_accuracy"),
        features="digits",
        reference=Reference(source="digits"),
    ),
    "pixels": Protocol(name="pixels", metrics=("fd_pixels",), features="pixels"),
}


class Result(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics, and all that it takes to judge or repeat them.

    Where the number of images is not the protocol's standard, the name of a metric says so: fd_digits@1000.
    """

    schema_version: int = SCHEMA_VERSION
    metrics: dict[str, float]
    protocol: Protocol
    protocol_sha256: str
    sampler: SamplerRecord | None
    """None: the images were there already."""
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """The result as a JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def results_json(results: Sequence[Result]) -> str:
    """Results as one JSON document."""
    document = msgspec.json.encode({"schema_version": SCHEMA_VERSION, "results": results})
    return msgspec.json.format(document, indent=2).decode()


def results_table(results: Sequence[Result]) -> str:
    """Results of one protocol as lines of text."""
    protocol = results[0].protocol
    reference = protocol.reference
    assert reference is not None
    where = f"{reference.source} ({reference.split}, {reference.n})"
    against = f"{protocol.n} images against {where}" if protocol.features else f"bits per dimension of {where}"
    names = ("NFE", *results[0].metrics)
    rows = [names]
    for result in results:
        nfe = str(result.sampler.nfe) if result.sampler else "-"
        rows.append((nfe, *(f"{value:.4g}" for value in result.metrics.values())))
    lines = [
        "".join(f"{cell:>{max(18, len(name) + 2)}}" for cell, name in zip(row, names, strict=True)) for row in rows
    ]
    return "\n".join([f"protocol {protocol.name}: {against}", *lines])


def require_comparable(a: Result, b: Result) -> None:
    """Raises EdmDistillError, naming what differs, unless two results were measured by one protocol."""
    ours, theirs = asdict(a.protocol), asdict(b.protocol)
    differences = [f"{key} ({ours[key]} and {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if differences:
        raise EdmDistillError(
            f"these results cannot be compared: they differ in {', '.join(differences)}; measure both by one protocol"
        )


def evaluate(
    model_or_images: Generator | Denoiser | Images | Tensor | str | Path,
    reference: Dataset | str | Path | None = None,
    *,
    protocol: str,
    nfe: int | None = None,
    gamma: float | None = None,
    times: Sequence[float] | Tensor | None = None,
    guidance: float | None = None,
    guide: Denoiser | None = None,
    force_guidance: bool = False,
    solver: str | None = None,
    seeds: Sequence[int] | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    source: str | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> Result:
    """Measures what a network draws, or images that are there already, against a data set.

    Args:
        model_or_images: a network, drawing where it is; or images as `found` gives or takes them: a folder, a zip, an
            .npz, an .npy, or uint8 [N,C,H,W].
        reference: a data set, or what open_dataset takes; default: the protocol's own.
        protocol: a key of PROTOCOLS.
        nfe, gamma, times, guidance, guide, force_guidance, solver: how a network draws, see `sample`.
        seeds: what a network draws; default: the protocol's. Image i has the class seeds[i] modulo label_dim.
        batch: images at a time.
        device: where features are computed.
        source: what the images come from, for the record.
        on_progress: called with the number of images that have just been measured.
    Raises:
        EdmDistillError: no such protocol, or an option that does not fit the network or the images.
        DatasetError: images or reference cannot be read, or do not fit each other or the protocol.
        NotFiniteError: a drawn image, or a metric, holds NaN or infinity; then nothing is measured.
    """
    standard = find_protocol(protocol)
    data = open_reference(reference, standard)
    if isinstance(model_or_images, Generator | Denoiser):
        spec = SamplerSpec(
            nfe=nfe,
            gamma=gamma,
            times=times,
            guidance=guidance,
            guide=guide,
            force_guidance=force_guidance,
            solver=solver,
        )
        record = build_sampler(model_or_images, spec).record

        def draw(seeds: Sequence[int], labels: Tensor | None) -> Tensor:
            return require_finite(generate_images(model_or_images, spec, seeds, labels, batch=batch), seeds)

        images = drawn(model_or_images, range(standard.n) if seeds is None else seeds, draw)
    elif (nfe, gamma, times, guidance, guide, solver, seeds, force_guidance or None) == (None,) * 8:
        given, record = model_or_images, None
        images = given if isinstance(given, Images) else found(given, data.label_dim)
    else:
        raise EdmDistillError(
            "nfe, gamma, times, guidance, solver and seeds say how a network draws, but these images exist: leave them "
            "out"
        )
    size = (data.img_channels, data.img_resolution, data.img_resolution)
    if images.size != size:
        raise DatasetError(
            f"the images are {'x'.join(map(str, images.size))}, but those of the reference {data.name} are "
            f"{'x'.join(map(str, size))}, and nothing is resized; choose a reference of their size"
        )
    if images.count < 2:
        raise DatasetError(f"a covariance needs two images, but there is {images.count}; the standard is {standard.n}")

    assert standard.features is not None
    space = FEATURES[standard.features](device)
    real, digest = _statistics_of(data, standard.features, str(device), batch)
    made, correct = RunningStatistics(), 0
    for rows in batches(images.count, batch):
        pixels = images.read(rows)
        made.update(space(pixels))
        if isinstance(space, Classifier) and images.classes is not None:
            correct += int((space.classify(pixels).argmax(1).cpu() == images.classes[rows.start : rows.stop]).sum())
        if on_progress is not None:
            on_progress(len(rows))

    values = {f"fd_{space.name}": frechet_distance(made.finish(), real)}
    if isinstance(space, Classifier) and images.classes is not None:
        values["class_accuracy"] = correct / images.count
    require_finite_metrics(values)
    suffix = "" if images.count == standard.n else f"@{images.count}"
    done = replace(
        standard,
        features_sha256=space.sha256,
        reference=Reference(source=Path(data.name).name, split=data.split, n=len(data), sha256=digest),
        n=images.count,
        seeds=None if images.seeds is None else format_seeds(images.seeds),
        labels=images.scheme,
    )
    return Result(
        metrics={name + suffix: values[name] for name in standard.metrics if name in values},
        protocol=done,
        protocol_sha256=done.sha256(),
        sampler=record,
        provenance=provenance(model_or_images, source, device),
    )


def require_finite_metrics(metrics: Mapping[str, float]) -> None:
    """Raises: NotFiniteError: a metric is NaN or infinite, and which."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}: the network or the features overflow, so nothing was measured")


def find_protocol(name: str) -> Protocol:
    """The standard of that name.  Raises EdmDistillError if there is none."""
    if name not in PROTOCOLS:
        raise EdmDistillError(f"there is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def open_reference(reference: Dataset | str | Path | None, standard: Protocol) -> Dataset:
    """The data set that a measurement is against.

    Args:
        reference: a data set, or what open_dataset takes; None: the standard's own.
    Raises: DatasetError: it cannot be opened, is not the one that the standard asks for, or none was named.
    """
    fixed = standard.reference
    if reference is None:
        if fixed is None:
            raise DatasetError(f"the protocol {standard.name} has no reference of its own; name a data set")
        return open_dataset(fixed.source, split=fixed.split)
    data = reference if isinstance(reference, Dataset) else open_dataset(reference)
    if fixed is not None and (data.name, data.split) != (fixed.source, fixed.split):
        raise DatasetError(
            f"the protocol {standard.name} measures against {fixed.source} ({fixed.split}), but the reference is "
            f"{data.name} ({data.split}); leave it out, or choose another protocol"
        )
    return data


@lru_cache(maxsize=4)
def _statistics_of(data: Dataset, features: str, device: str, batch: int) -> tuple[Statistics, str]:
    """Statistics of a reference's features, and the sha256 of its images; kept, since measurements come in rows."""
    space, running = FEATURES[features](device), RunningStatistics()
    digest = pixels_digest(data, len(data))
    for rows in batches(len(data), batch):
        pixels = data.images(rows)
        digest.update(pixels.numpy().tobytes())
        running.update(space(pixels))
    return running.finish(), digest.hexdigest()


def pixels_digest(data: Dataset, count: int) -> hashlib._Hash:
    """What is to be fed the pixels of so many of the images, for Reference.sha256."""
    return hashlib.sha256(f"{count}x{data.img_channels}x{data.img_resolution}:".encode())


def batches(count: int, batch: int) -> Iterator[range]:
    """range(count) in pieces of at most `batch`."""
    return (range(at, min(at + batch, count)) for at in range(0, count, batch))


def provenance(images: object, source: str | None, device: torch.device | str) -> dict[str, Any]:
    """What was measured, and with what."""
    made_with = {"edmdistill": __version__, "torch": str(torch.__version__), "device": str(device)}
    if isinstance(images, Generator):
        config = images.config
        kept = {name: getattr(config, name) for name in ("method", "recipe_hash", "images_seen", "provenance")}
        return {"source": source and without_secrets(source), **kept, **made_with}
    if isinstance(images, str | Path):
        source = source or str(images)
    source = source and without_secrets(source)
    return {"source": source, **made_with}
