"""Evaluation: images against a reference, in numbers that say how they were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset
from edmdistill.errors import DatasetError, EdmDistillError, NotFiniteError, without_secrets
from edmdistill.evaluation.base import Accumulator, Measured, Metric
from edmdistill.evaluation.images import Images, open_images, sampled_images
from edmdistill.evaluation.metrics import find_metric, metric_label
from edmdistill.evaluation.protocol import Protocol, Reference, get_protocol, open_reference, pixels_digest
from edmdistill.evaluation.results import Result
from edmdistill.features.base import Classifier
from edmdistill.features.spaces import FEATURE_SPACES
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.generate import generate_images
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerSpec


def evaluate(
    model_or_images: Generator | Denoiser | Images | Tensor | str | Path,
    reference: Dataset | str | Path | None = None,
    *,
    protocol: str,
    sampler: SamplerSpec = SamplerSpec(),
    seeds: Sequence[int] | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    source: str | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> Result:
    """Measures the samples of a network, or images that exist already, against a data set.

    Args:
        model_or_images: a network, sampled on its own device; or Images, or a source for open_images: a folder, a zip,
            an .npz, an .npy, or uint8 [N,C,H,W].
        reference: a data set, or a source for open_dataset; default: the protocol's own.
        protocol: a key of PROTOCOLS.
        sampler: how a network is sampled; default: the network's own.
        seeds: of the samples; default: the protocol's. Image i has the class seeds[i] modulo label_dim.
        batch: images at a time.
        device: where features are computed.
        source: where the images come from, for the record.
        on_progress: called with the number of images that have just been measured.
    Raises:
        EdmDistillError: no such protocol, or an option that does not fit the network or the images.
        DatasetError: images or reference cannot be read, or do not fit each other or the protocol.
        NotFiniteError: a sample, or a metric, is NaN or infinite; then nothing is measured.
    """
    standard = get_protocol(protocol)
    data = open_reference(reference, standard)
    record = None
    if isinstance(model_or_images, Generator | Denoiser):
        record = build_sampler(model_or_images, sampler).record
        draw = partial(generate_images, model_or_images, sampler, batch=batch)
        images = sampled_images(model_or_images, range(standard.n) if seeds is None else seeds, draw)
    elif sampler != SamplerSpec() or seeds is not None:
        raise EdmDistillError("sampler and seeds are for sampling a network, but these are images; leave them out")
    else:
        given = model_or_images
        images = given if isinstance(given, Images) else open_images(given, data.label_dim)
    _require_fit(images, data, standard)
    assert standard.features is not None
    space = FEATURE_SPACES[standard.features](device)
    classified = images.classes is not None and isinstance(space, Classifier)
    metrics, reference_sha256 = _make_metrics(data, standard.metrics, standard.features, classified, device, batch)
    for rows in batches(images.count, batch):
        labels = None if images.classes is None else images.classes[rows.start : rows.stop]
        pixels = images.read(rows)
        logits = space.classify(pixels).log() if isinstance(space, Classifier) else None
        measured = Measured(space(pixels), logits, labels)
        for metric in metrics.values():
            metric.update(measured)
        if on_progress is not None:
            on_progress(len(rows))
    values = require_finite_metrics({name: metric.finish() for name, metric in metrics.items()})
    done = replace(
        standard,
        features_sha256=space.sha256,
        reference=Reference(source=Path(data.name).name, split=data.split, n=len(data), sha256=reference_sha256),
        n=images.count,
        seeds=None if images.seeds is None else format_seeds(images.seeds),
        labels=images.label_source,
    )
    return Result(
        metrics={metric_label(name, space, images.count, standard.n): value for name, value in values.items()},
        protocol=done,
        protocol_sha256=done.sha256(),
        sampler=record,
        provenance=provenance(model_or_images, source, device),
    )


def _require_fit(images: Images, data: Dataset, standard: Protocol) -> None:
    """Raises DatasetError unless the images have the size of the reference, and are two or more."""
    size = (data.img_channels, data.img_resolution, data.img_resolution)
    if images.size != size:
        raise DatasetError(
            f"the images are {'x'.join(map(str, images.size))}, but those of the reference {data.name} are "
            f"{'x'.join(map(str, size))}, and nothing is resized; choose a reference of that size"
        )
    if images.count < 2:
        raise DatasetError(
            f"a covariance needs at least two images, but there is only {images.count}; the protocol uses {standard.n}"
        )


def _make_metrics(
    data: Dataset, names: tuple[str, ...], features: str, classified: bool, device: torch.device | str, batch: int
) -> tuple[dict[str, Metric], str]:
    """Returns the metrics by name, without those that need labels unless `classified`, and the reference's sha256."""
    collected, digest = _collect_reference(data, names, features, str(device), batch)
    found = [find_metric(name, features) for name in names]
    kinds = [each for each in found if classified or not each.metric.needs]
    metrics = {each.name: each.metric(collected[each.metric.reference]) for each in kinds}
    return metrics, digest


@lru_cache(maxsize=4)
def _collect_reference(
    data: Dataset, metrics: tuple[str, ...], features: str, device: str, batch: int
) -> tuple[dict[type[Accumulator], Any], str]:
    """Returns what each metric compares with, and the sha256 of the images; cached for the measurements that follow."""
    space, digest = FEATURE_SPACES[features](device), pixels_digest(data, len(data))
    accumulators = {kind: kind() for kind in {find_metric(name, features).metric.reference for name in metrics}}
    for rows in batches(len(data), batch):
        pixels = data.images(rows)
        digest.update(pixels.numpy().tobytes())
        vectors = space(pixels)
        for accumulator in accumulators.values():
            accumulator.update(vectors)
    return {kind: accumulator.finish() for kind, accumulator in accumulators.items()}, digest.hexdigest()


def batches(count: int, batch: int) -> Iterator[range]:
    """Yields range(count) in pieces of at most `batch`."""
    return (range(at, min(at + batch, count)) for at in range(0, count, batch))


def require_finite_metrics(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Returns metrics if all are finite.  Raises NotFiniteError, naming the one that is not."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}: the network or the features overflow, and nothing was measured")
    return metrics


def provenance(model_or_images: object, source: str | None, device: torch.device | str) -> dict[str, Any]:
    """Returns the record of what was measured, and with which versions."""
    versions = {"edmdistill": __version__, "torch": str(torch.__version__), "device": str(device)}
    if isinstance(model_or_images, str | Path):
        source = source or str(model_or_images)
    origin: dict[str, Any] = {"source": source and without_secrets(source)}
    if isinstance(model_or_images, Generator):
        config = model_or_images.config
        origin |= {name: getattr(config, name) for name in ("method", "recipe_hash", "images_seen", "provenance")}
    return origin | versions
