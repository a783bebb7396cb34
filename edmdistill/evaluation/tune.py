"""Tunes the schedules of a generator by a metric, and stores those that were confirmed in its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace

from edmdistill.atomic import expanded, unwritable
from edmdistill.checkpoints.config import CheckpointConfig, read_config, write_config
from edmdistill.checkpoints.layout import CONFIG, checkpoint_in
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.errors import EdmDistillError, NotFiniteError, counted
from edmdistill.evaluation.metrics import loss_of
from edmdistill.evaluation.protocol import PROTOCOLS, get_protocol
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.shards import ONE_PROCESS, Processes
from edmdistill.progress import progress_bar
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.sampling.tune import Sigmas, TuningPlan, choose_schedule
from edmdistill.trigflow import sigma_to_time

VERSIONS = ("edmdistill", "revision", "torch", "device", "compiled")
"""What a tuning keeps of a result's Origin."""


def tune_schedules(
    evaluate: Callable[..., Result],
    folder: Path,
    nfes: Sequence[int],
    plan: TuningPlan,
    processes: Processes = ONE_PROCESS,
) -> dict[int, Tuning]:
    """Tunes the schedules of the generator in a folder for several numbers of steps, and shows progress.

    Args and Raises: as `tune_schedule`.
    """
    config, tunings = read_config(folder), {}
    for nfe in dict.fromkeys(nfes):
        most = plan.most_schedules(nfe, starts=2) + 2 * plan.sets
        with progress_bar(most * plan.n, desc=f"{nfe} NFE, at most {most} measurements") as bar:
            tunings[nfe] = tune_schedule(evaluate, config, nfe, plan, processes=processes, on_progress=bar.update)
    return tunings


def tune_schedule(
    evaluate: Callable[..., Result],
    config: CheckpointConfig,
    nfe: int,
    plan: TuningPlan,
    *,
    processes: Processes = ONE_PROCESS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Tuning:
    """Tunes the schedule of a generator for some number of steps, by the only metric that an evaluation gives.

    Args:
        evaluate: evaluation.evaluate of the generator, with all arguments but sampler, seeds and on_progress.
        config: the generator's.
        plan: see TuningPlan.
        processes: that share the evaluations; a schedule whose samples are not finite fails on several of them, and on
            one is worse than all others.
        on_progress: called with the number of images that have just been measured.
    Raises: EdmDistillError: as `evaluate`; or the plan's images are too few.
    """
    results: list[Result] = []
    searched, *held_out = plan.seeds

    def measure(sigmas: Sigmas, seeds: range) -> float:
        times = sigma_to_time(torch.tensor(sigmas, dtype=torch.float64), config.sigma_data)
        try:
            result = evaluate(sampler=SamplerSpec(times=times), seeds=seeds, on_progress=on_progress)
        except NotFiniteError:
            if processes.world_size > 1 or not results or seeds != searched:
                raise
            return math.inf
        results.append(result)
        ((name, value),) = result.metrics.items()
        return loss_of(name, value)

    stored = config.sampling.sigmas.get(str(nfe))
    choice = choose_schedule(measure, nfe, config.sigma_min, config.sigma_max, stored=stored, plan=plan)
    protocol, sampler, origin, (metric,) = (
        results[0].protocol,
        results[0].sampler,
        results[0].provenance,
        results[0].metrics,
    )
    reference, sign = protocol.reference, loss_of(metric, 1)
    assert reference is not None
    assert sampler is not None
    versions = {name: value for name, value in dict[str, Any](origin).items() if name in VERSIONS}
    return Tuning(
        sigmas=choice.sigmas,
        before=choice.before,
        metric=metric,
        protocol=protocol.name,
        reference=reference.sha256,
        gamma=sampler.gamma or 0.0,
        n=plan.n,
        search_seeds=format_seeds(searched),
        held_out_seeds=format_seeds(range(held_out[0].start, held_out[-1].stop)),
        schedules=choice.schedules,
        images=plan.n * (choice.schedules + len(choice.scores) + len(choice.before_scores)),
        values=tuple(sign * score for score in choice.scores),
        before_values=tuple(sign * score for score in choice.before_scores),
        gain=choice.gain,
        spread=choice.spread,
        source_sha256=origin.get("source_sha256"),
        guidance=sampler.guidance,
        dtype=sampler.dtype,
        weights=protocol.weights,
        decoder=protocol.decoder,
        **versions,
    )


def find_measure(metric: str | None, protocol: str | None) -> tuple[str, str]:
    """Returns a metric and a protocol where one of the two is given: the protocol's first metric, or the first protocol
    that has the metric.

    Raises: EdmDistillError: neither is given, or no protocol has the metric.
    """
    if protocol is not None:
        return metric or get_protocol(protocol).metrics[0], protocol
    measuring = next((name for name, standard in PROTOCOLS.items() if metric in standard.metrics), None)
    if metric is None or measuring is None:
        what = "neither a metric nor a protocol is named" if metric is None else f"no protocol measures {metric}"
        raise EdmDistillError(f"{what}: add --protocol, one of {', '.join(PROTOCOLS)}")
    return metric, measuring


def find_generator(source: str | Path, *, stored: bool = True) -> Path:
    """Returns the checkpoint folder of a generator or a run on this disk.

    Args:
        stored: whether schedules are to be stored in it.
    Raises: EdmDistillError: it is something else, or may not be written.  CheckpointError: it is damaged, or no
        checkpoint.
    """
    path = expanded(source)
    if not path.is_dir():
        raise EdmDistillError(
            f"a schedule is stored with its generator, but {source} is no folder here: give a checkpoint or a run"
        )
    folder = checkpoint_in(path)
    if (stage := read_config(folder).stage) != "generator":
        raise EdmDistillError(f"{source} is a {stage}, and schedules are tuned of generators: give a distilled one")
    if stored and (refusing := unwritable(folder / CONFIG)) is not None:
        raise EdmDistillError(
            f"a schedule is stored with its generator, but this user may not write in {refusing}: copy the checkpoint, "
            "or add --dry-run"
        )
    return folder


def store_tunings(folder: Path, tunings: Mapping[int, Tuning]) -> bool:
    """Stores the schedules that were confirmed, and how they were chosen, in a checkpoint; the others are left out.

    Returns: whether there were any.
    Raises: CheckpointError: the disk refuses.
    """
    confirmed = {str(nfe): tuning for nfe, tuning in tunings.items() if tuning.confirmed}
    if not confirmed:
        return False
    config = read_config(folder)
    sigmas = config.sampling.sigmas | {nfe: tuning.sigmas for nfe, tuning in confirmed.items()}
    sampling = replace(config.sampling, sigmas=sigmas)
    write_config(folder, replace(config, sampling=sampling, tunings=config.tunings | confirmed))
    return True


def describe_tuning(nfe: int, tuning: Tuning) -> str:
    """Returns a sentence on what came out of tuning for some number of steps."""
    after, before = (" ".join(f"{sigma:.4g}" for sigma in some) for some in (tuning.sigmas, tuning.before))
    cost = f"{counted(tuning.schedules, 'schedule')}, {counted(tuning.images, 'image')}"
    if not tuning.values:
        return f"{nfe} NFE: {before} stays; none was better in {cost}"
    verdict = (
        f"{before} -> {after}"
        if tuning.confirmed
        else f"{before} stays, for {after} is not better by more than the spread"
    )
    return f"{nfe} NFE: {verdict}; {tuning.words}, gain {tuning.gain:.2g}, spread {tuning.spread:.2g} ({cost})"


def tuning_json(source: str, tunings: Mapping[int, Tuning]) -> str:
    """Returns tunings as a JSON document."""
    schedules = {
        str(nfe): msgspec.to_builtins(tuning) | {"confirmed": tuning.confirmed} for nfe, tuning in tunings.items()
    }
    document = {"schema_version": 1, "source": source, "schedules": schedules}
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
