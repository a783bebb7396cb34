"""Evaluation: images against a reference, in numbers that say how they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.arguments import checked
from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import tensors_digest
from edmdistill.data.datasets import Dataset
from edmdistill.errors import EdmDistillError, without_secrets
from edmdistill.evaluation.checks import choose_seeds, measurable, require_fit, require_options
from edmdistill.evaluation.images import Images, open_images, sampled_images
from edmdistill.evaluation.metrics import find_metric, metric_label
from edmdistill.evaluation.panel import Panel, collect_reference, stated_by
from edmdistill.evaluation.protocol import Protocol, get_protocol, open_reference
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.evaluation.results import Origin, Result, read_results, results_json
from edmdistill.evaluation.shards import ONE_PROCESS, RESULT, Processes, Work, remove_shards
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.decode import Decoder, LatentDecoder
from edmdistill.sampling.generate import in_eval_mode, is_latent
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerRecord, SamplerSpec
from edmdistill.version import revision


@checked
def evaluate(
    model_or_images: Generator | Denoiser | Images | Tensor | str | Path,
    reference: Dataset | ReferenceStatistics | str | Path | None = None,
    *,
    protocol: str,
    sampler: SamplerSpec = SamplerSpec(),
    metrics: Sequence[str] | None = None,
    weights: Mapping[str, str | Path] = {},
    seeds: Sequence[int] | None = None,
    repeat: int = 1,
    decode: Decoder = to_uint8,
    device: torch.device | str = "cpu",
    source: str | None = None,
    source_sha256: str | None = None,
    raw: bool = False,
    work: Work | None = None,
    processes: Processes = ONE_PROCESS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Result:
    """Measures the samples of a network, or images that exist already, against real images.

    Args:
        model_or_images: a network, sampled on its own device; or Images, or a source for open_images: a folder, a zip,
            an .npz, an .npy, or uint8 [N,C,H,W].
        reference: a data set, or a source for open_dataset; or statistics, or a file for open_statistics; default: the
            protocol's own.
        protocol: a key of PROTOCOLS.
        sampler: how a network is sampled; default: the network's own.
        metrics: see find_metric; default: the protocol's.
        weights: files of feature spaces, by name; default: the official ones, see load_features.
        seeds: of the samples; default: the protocol's.
        repeat: measure so many times as many images, of consecutive seeds, and return means over these times.
        decode: of open_decoder, for a network that makes latents.
        device: where features are computed.
        source, source_sha256: where network or images come from, and the digest of its file, for the record; default:
            the digest of a network's weights as they are in memory.
        raw: for the record: the network has a run's raw weights, not the average that the run publishes.
        work: where an evaluation is kept, so that it goes on after it was stopped; None: it begins anew.
        processes: that share the evaluation.
        on_progress: called with the number of images that have just been measured.
    Returns: the result, in all processes. Without `metrics`, those of the protocol that need classes are left out
        where the classes are unknown.
    Raises:
        EdmDistillError: no such protocol or metric, or an option that does not fit the network or the images.
        DatasetError: images or reference cannot be read, or do not fit each other or the protocol.
        CheckpointError: the weights of a feature space are not here, or the disk refuses.
        NotFiniteError: a sample, or a metric, is NaN or infinite; then nothing is measured.
    """
    standard = get_protocol(protocol)
    data = open_reference(reference, standard)
    named = metrics or standard.metrics
    wanted = list(dict.fromkeys(find_metric(name, str(standard.features)) for name in named))
    require_options(sampler, weights, wanted)
    if isinstance(model_or_images, Generator | Denoiser):
        classes = any("labels" in one.metric.needs for one in wanted)
        chosen = choose_seeds(seeds, repeat, standard)
        subject = _samples(model_or_images, sampler, chosen, decode, standard, with_classes=classes)
    elif sampler != SamplerSpec() or seeds is not None or repeat > 1:
        raise EdmDistillError(
            "sampler, seeds and repeat are for sampling a network, but these are images; leave them out"
        )
    else:
        given, label_dim = model_or_images, getattr(data, "label_dim", 0)
        images = given if isinstance(given, Images) else open_images(given, label_dim)
        subject = _Subject(images, record=images.sampler)
    images = subject.images
    require_fit(images, data, standard, repeat)
    measured = measurable(wanted, images, required=metrics is not None)
    files = tuple(sorted((name, str(file)) for name, file in weights.items()))
    panel = Panel(measured, files, str(device), work, processes)
    if isinstance(data, ReferenceStatistics):
        stated_by(data, panel)  # what it lacks is said before anything is kept
    done = replace(
        standard,
        metrics=tuple(one.name for one in measured),
        weights={name: space.sha256 for name, space in panel.spaces.items()},
        n=images.count // repeat,
        seeds=None if images.seeds is None else format_seeds(images.seeds),
        repeat=repeat,
        labels=images.label_source,
        decoder=decode.vae.sha256 if isinstance(decode, LatentDecoder) else images.decoder,
    )
    origin = provenance(model_or_images, source, device, source_sha256, raw)
    task = _Task(subject, data, panel, done, standard.n, origin)
    return task.run(on_progress) if work is None else task.resume(work, on_progress)


class _Subject(NamedTuple):
    """The images that are measured, and how a network draws them."""

    images: Images
    model: Generator | Denoiser | None = None
    sampler: SamplerSpec = SamplerSpec()
    record: SamplerRecord | None = None

    def identity(self) -> dict[str, Any]:
        """Returns what decides the images beside the protocol.  Raises: EdmDistillError: it is not known."""
        if self.model is None:
            if self.images.identity is None:
                raise EdmDistillError("images in memory cannot be recognized by another process: leave out work")
            return {"images": self.images.identity()}
        return {"sampler": self.record}


class _Task(NamedTuple):
    """An evaluation that has been checked.  standard_n: the number of images that the protocol asks for."""

    subject: _Subject
    data: Dataset | ReferenceStatistics
    panel: Panel
    protocol: Protocol
    standard_n: int
    origin: Origin

    def resume(self, work: Work, on_progress: Callable[[int], object]) -> Result:
        """Returns the result of what is kept and of what was missing."""
        data = self.data
        known = data.content_sha256 if isinstance(data, Dataset) else data.sha256
        origin = {name: value for name, value in self.origin.items() if name != "revision"}  # any commit goes on
        identity = self.subject.identity() | {"reference": known, "origin": origin, "standard_n": self.standard_n}
        processes = self.panel.processes
        folder = work.folder(msgspec.to_builtins(identity | {"protocol": self.protocol}), processes)
        file = folder / RESULT
        if not file.exists():
            result = self.run(on_progress, folder)
            if processes.rank == 0:
                with atomic_write(file) as new:
                    new.write_text(results_json([result]), encoding="utf-8")
                remove_shards(folder)
            processes.any_process(False)
        else:
            on_progress(self.subject.images.count)
        result = read_results([file])[0]
        processes.any_process(False)  # the main process may remove the file when all have read it
        return result

    def run(self, on_progress: Callable[[int], object], folder: Path | None = None) -> Result:
        """Returns the result.

        Args:
            folder: where features are kept.
        """
        panel, images, count = self.panel, self.subject.images, self.protocol.n
        repetitions = []
        with in_eval_mode(self.subject.model, self.subject.sampler.guide):
            collected = collect_reference(self.data, panel)
            for at in range(0, images.count, count):
                kept = None if folder is None else folder / str(at)
                repetitions.append(panel.values(images.part(range(at, at + count)), collected, kept, on_progress))
        spaces = panel.spaces
        labels = {
            one.name: metric_label(one.name, spaces[one.features], count, self.standard_n) for one in panel.metrics
        }
        named = [{labels[name]: value for name, value in values.items()} for values in repetitions]
        protocol = replace(self.protocol, reference=collected.reference)
        return Result(
            metrics={name: fmean(values[name] for values in named) for name in named[0]},
            repetitions=tuple(named) if len(named) > 1 else (),
            protocol=protocol,
            protocol_sha256=protocol.sha256(),
            sampler=self.subject.record,
            provenance=self.origin,
        )


def _samples(
    model: Generator | Denoiser,
    sampler: SamplerSpec,
    seeds: Sequence[int],
    decode: Decoder,
    standard: Protocol,
    *,
    with_classes: bool,
) -> _Subject:
    """Returns the images of a network.  Raises: EdmDistillError: they are latents, or an option does not fit."""
    record = build_sampler(model, sampler).record
    if sampler.guide is not None:
        record = replace(record, guide=tensors_digest(sampler.guide))
    if is_latent(model) and decode is to_uint8:
        raise EdmDistillError("this network makes latents, which are not pictures: give decode, of open_decoder")
    images = sampled_images(model, sampler, seeds, decode, labels=standard.labels, with_classes=with_classes)
    return _Subject(images, model, sampler, record)


def provenance(
    model_or_images: object,
    source: str | None,
    device: torch.device | str,
    source_sha256: str | None = None,
    raw: bool = False,
) -> Origin:
    """Returns the record of what was measured, with which versions, and of what decides the rounding, as JSON."""
    versions: dict[str, Any] = {"edmdistill": __version__, "revision": revision(), "torch": str(torch.__version__)}
    versions["device"] = torch.device(device).type
    if isinstance(model_or_images, Generator | Denoiser) and model_or_images.flow.network.compiled:
        versions["compiled"] = True
    if isinstance(model_or_images, str | Path):
        source = source or str(model_or_images)
    origin: dict[str, Any] = {"source": source and without_secrets(source)}
    if isinstance(model_or_images, Generator):
        config = model_or_images.config
        origin |= {name: getattr(config, name) for name in ("method", "recipe_hash", "images_seen", "provenance")}
    elif isinstance(model_or_images, Denoiser) and model_or_images.images_seen is not None:
        origin["images_seen"] = model_or_images.images_seen
    if source_sha256 is None and isinstance(model_or_images, Generator | Denoiser):
        source_sha256 = tensors_digest(model_or_images)
    if source_sha256 is not None:
        origin["source_sha256"] = source_sha256
    if raw:
        origin["weights"] = "raw"
    return msgspec.convert(msgspec.to_builtins(origin | versions), Origin)
