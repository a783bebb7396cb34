"""Several measurements of one source, each saved as soon as it is done: an interrupt loses only the one under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset
from edmdistill.errors import DatasetError, NotFiniteError, counted
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.images import Images
from edmdistill.evaluation.likelihood import evaluate_likelihood
from edmdistill.evaluation.protocol import Protocol
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.evaluation.results import Result, save_results
from edmdistill.evaluation.shards import ONE_PROCESS, Processes, Work
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.spec import SamplerSpec

Task = tuple[str, Callable[..., Result]]


class Measurements(NamedTuple):
    """Measurements of one source.

    Attributes:
        tasks: each with its name, called with on_progress.
        images: their number in all of them.
        work: where what is measured is kept, or None.
        processes: that share them.
    """

    tasks: Sequence[Task]
    images: int
    work: Work | None = None
    processes: Processes = ONE_PROCESS


class MeasuredResults(NamedTuple):
    """The results of measurements.

    Attributes:
        failures: a sentence for each that had no finite result.
        interrupted: by Ctrl-C; the results are those before it.
    """

    results: Sequence[Result]
    failures: Sequence[str]
    interrupted: bool


def measure_images(
    images: Images,
    data: Dataset | ReferenceStatistics,
    protocol: Protocol,
    source: str,
    *,
    count: int | None,
    **options: Any,
) -> Measurements:
    """Returns the measurement of images that exist.

    Args:
        count: measure the first so many; None: all.
        options: of `evaluate`.
    Raises: DatasetError: there are fewer.
    """
    if count is not None and count > images.count:
        raise DatasetError(
            f"{source} has {counted(images.count, 'image')}, fewer than --n {count:,}: give more, or leave it out"
        )
    some = images if count is None else images.part(range(count))
    task = partial(evaluate, some, data, protocol=protocol.name, source=source, **options)
    return _measurements([(source, task)], some.count, options)


def measure_network(
    model: Generator | Denoiser,
    data: Dataset | ReferenceStatistics,
    protocol: Protocol,
    *,
    samplers: Iterable[SamplerSpec],
    seeds: Sequence[int] | None,
    repeat: int = 1,
    **options: Any,
) -> Measurements:
    """Returns a measurement for each sampler, for equal ones a single one.  options: the others of `evaluate`."""
    common = {"protocol": protocol.name, "seeds": seeds, "repeat": repeat, **options}
    tasks = [
        (describe(sampler), partial(evaluate, model, data, sampler=sampler, **common))
        for sampler in dict.fromkeys(samplers)
    ]
    count = protocol.n if seeds is None else len(seeds)
    return _measurements(tasks, len(tasks) * count * repeat, options)


def _measurements(tasks: Sequence[Task], images: int, options: Mapping[str, Any]) -> Measurements:
    return Measurements(tasks, images, options.get("work"), options.get("processes", ONE_PROCESS))


def describe(sampler: SamplerSpec) -> str:
    """Returns what users call a sampler."""
    words = [f"{sampler.nfe or 'default'} NFE"] if sampler.times is None else []
    words += [] if sampler.times is None else [f"times {' '.join(f'{float(time):.4g}' for time in sampler.times)}"]
    words += [f"{name} {value:g}" for name in ("gamma", "guidance") if (value := getattr(sampler, name)) is not None]
    return ", ".join(words)


def measure_likelihood(
    model: Generator | Denoiser, data: Dataset, *, count: int | None, probes: int, **options: Any
) -> Measurements:
    """Returns the measurement of a likelihood.  options: the others of `evaluate_likelihood`."""
    task = partial(evaluate_likelihood, model, data, count=count, probes=probes, **options)
    return Measurements([("nll", task)], min(count or len(data), len(data)) * probes)


def run_measurements(
    measurements: Measurements, folder: Path | None = None, on_progress: Callable[[int], object] = lambda count: None
) -> MeasuredResults:
    """Makes measurements one after another, until all are done or Ctrl-C.

    Args:
        folder: of results.find_results_folder, where each result is saved; None: nowhere.
        on_progress: called with the number of images that have just been measured.
    Raises: NotFiniteError: of several processes, one has a sample that is not finite.
    """
    main = measurements.processes.rank == 0
    results: list[Result] = []
    failures: list[str] = []
    try:
        for name, task in measurements.tasks:
            try:
                result = task(on_progress=on_progress)
            except NotFiniteError as error:
                if measurements.processes.world_size > 1:
                    raise  # the others wait for what this process cannot give
                failures.append(f"{name}: {error}")
                continue
            if folder is not None and main:
                save_results(folder, [result])
            results.append(result)
    except KeyboardInterrupt:
        return MeasuredResults(results, failures, True)
    return MeasuredResults(results, failures, False)
