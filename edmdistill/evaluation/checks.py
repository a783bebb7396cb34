"""Checks of an evaluation before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edmdistill.data.datasets import Dataset
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.images import Images, open_images
from edmdistill.evaluation.metrics import FoundMetric
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerSpec


def choose_seeds(seeds: Sequence[int] | None, repeat: int, standard: Protocol) -> Sequence[int]:
    """Returns the seeds of all repetitions.  Raises EdmDistillError unless they follow one another."""
    chosen = range(standard.n) if seeds is None else seeds
    if not len(chosen):
        raise EdmDistillError("there is nothing to measure: pass at least two seeds")
    if repeat == 1:
        return chosen
    if list(chosen) != list(range(chosen[0], chosen[0] + len(chosen))):
        raise EdmDistillError(f"seeds {format_seeds(chosen)[:80]} cannot be repeated: consecutive ones can")
    return range(chosen[0], chosen[0] + repeat * len(chosen))


def require_options(sampler: SamplerSpec, weights: Mapping[str, object], wanted: Sequence[FoundMetric]) -> None:
    """Raises EdmDistillError for a picture to start from, and for weights of a feature space that no metric reads."""
    if sampler.reference is not None:
        raise EdmDistillError("the samples that are measured start from noise: leave the sampler's reference out")
    spaces = list(dict.fromkeys(one.features for one in wanted))
    for name in weights:
        if name not in spaces:
            raise EdmDistillError(
                f"weights of {name} were given, but the metrics are measured in {', '.join(spaces)}: leave them out, "
                "or name one of these"
            )


def measurable(wanted: Sequence[FoundMetric], images: Images, *, required: bool) -> tuple[FoundMetric, ...]:
    """Returns the metrics that can be measured: those that need classes take known ones.

    Args:
        required: whether they were asked for by name.
    Raises: EdmDistillError: one that was asked for needs classes.
    """
    measured = tuple(one for one in wanted if images.classes is not None or "labels" not in one.metric.needs)
    if (missing := [one.name for one in wanted if one not in measured]) and (required or not measured):
        raise EdmDistillError(f"{missing[0]} needs images whose classes are known: leave it out")
    return measured


def require_size(images: tuple[int, ...], data: Dataset | ReferenceStatistics) -> None:
    """Raises DatasetError unless images have the size of the reference's, if it is known.  images: (C, H, W)"""
    size: tuple[int, ...] | None = None
    name = ""
    if isinstance(data, Dataset):
        size, name = data.size, data.name
    elif data.has_images:
        size, name = open_images(data.path, 0).size, str(data.path)
    if size not in (None, images):
        raise DatasetError(
            f"the images are {'x'.join(map(str, images))}, but those of the reference {name} are "
            f"{'x'.join(map(str, size or ()))}, and nothing is resized; choose a reference of that size, "
            "or images of the reference's"
        )


def require_fit(images: Images, data: Dataset | ReferenceStatistics, standard: Protocol, repeat: int) -> None:
    """Raises DatasetError unless the images have the size of the reference's, if it is known, and are two or more."""
    require_size(images.size, data)
    if images.count < 2 * repeat:
        raise DatasetError(
            f"a covariance needs at least two images, but there is only {images.count // repeat}; the protocol uses "
            f"{standard.n}"
        )
