"""Several measurements of one source: each is saved as soon as it is done, and those before an interrupt count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset
from edmdistill.errors import NotFiniteError
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.images import Images
from edmdistill.evaluation.likelihood import evaluate_likelihood
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.results import Result, save_results
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.spec import SamplerSpec


class Measurements(NamedTuple):
    """Measurements by name, each called with on_progress, and the number of images in all of them."""

    tasks: Mapping[str, Callable[..., Result]]
    images: int


class Outcome(NamedTuple):
    """What became of measurements.

    Attributes:
        failures: a sentence for each that had no finite result.
        interrupted: by Ctrl-C; the results are those before it.
    """

    results: Sequence[Result]
    failures: Sequence[str]
    interrupted: bool


def measure_images(images: Images, data: Dataset, protocol: Protocol, source: str, **options: Any) -> Measurements:
    """Returns the measurement of images that exist.  options: of `evaluate`."""
    task = partial(evaluate, images, data, protocol=protocol.name, source=source, **options)
    return Measurements({source: task}, images.count)


def measure_network(
    model: Generator | Denoiser,
    data: Dataset,
    protocol: Protocol,
    *,
    samplers: Iterable[SamplerSpec],
    seeds: Sequence[int] | None,
    **options: Any,
) -> Measurements:
    """Returns a measurement for each sampler.  options: the others of `evaluate`."""
    tasks = {}
    for sampler in samplers:
        name = f"{sampler.nfe or 'default'} NFE" + ("" if sampler.gamma is None else f", gamma {sampler.gamma:g}")
        tasks[name] = partial(evaluate, model, data, protocol=protocol.name, sampler=sampler, seeds=seeds, **options)
    return Measurements(tasks, len(tasks) * (protocol.n if seeds is None else len(seeds)))


def measure_likelihood(
    model: Generator | Denoiser, data: Dataset, *, count: int | None, probes: int, **options: Any
) -> Measurements:
    """Returns the measurement of a likelihood.  options: the others of `evaluate_likelihood`."""
    task = partial(evaluate_likelihood, model, data, count=count, probes=probes, **options)
    return Measurements({"nll": task}, min(count or len(data), len(data)) * probes)


def run_measurements(
    measurements: Measurements, folder: Path | None = None, on_progress: Callable[[int], object] = lambda count: None
) -> Outcome:
    """Makes measurements one after another, until all are done or Ctrl-C.

    Args:
        folder: of results.find_results_folder, where each result is saved; None: nowhere.
        on_progress: called with the number of images that have just been measured.
    """
    results: list[Result] = []
    failures: list[str] = []
    try:
        for name, task in measurements.tasks.items():
            try:
                result = task(on_progress=on_progress)
            except NotFiniteError as error:
                failures.append(f"{name}: {error}")
                continue
            if folder is not None:
                save_results(folder, [result])
            results.append(result)
    except KeyboardInterrupt:
        return Outcome(results, failures, True)
    return Outcome(results, failures, False)
