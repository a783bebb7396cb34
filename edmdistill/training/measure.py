"""Metrics over training: what [evaluation] asks for, in the lines of metrics.jsonl; the best average is kept.

The average is sampled and measured as `edmdistill eval` does a checkpoint, with random streams of its own, so that
nothing that is trained depends on it. The processes share the images, through their memory. A run that is asked to stop
meanwhile gives the evaluation up, and makes it when it resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.data.datasets import Dataset
from edmdistill.errors import NotFiniteError, TrainingError, counted
from edmdistill.evaluation.checks import require_options
from edmdistill.evaluation.diagnosis import Diagnosis, diagnose_networks
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.metrics import find_metric, loss_of
from edmdistill.evaluation.protocol import get_protocol, open_reference
from edmdistill.evaluation.references import ReferenceStatistics
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import load_features
from edmdistill.machine.engine import Engine
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.schema import EvaluationTable
from edmdistill.sampling.decode import Decoder, open_decoder, vae_on
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.metrics import metric_and_nfe, quality_name
from edmdistill.training.monitors import Alarm
from edmdistill.training.run import Run
from edmdistill.training.run_dir import RunDir
from edmdistill.training.snapshot import generator_saver

WORSE = 2.0
"""A distance above so many times the lowest one is an alarm."""


class EvaluationStopped(Exception):
    """The run is asked to stop during an evaluation."""


class StoppableProcesses(NamedTuple):
    """The processes of a run, which leave an evaluation together, between two batches.

    Attributes:
        stop: set when this process is asked to stop.
    """

    engine: Engine
    stop: Event

    @property
    def rank(self) -> int:
        return self.engine.rank

    @property
    def world_size(self) -> int:
        return self.engine.world_size

    def any_process(self, flag: bool) -> bool:
        """As Engine's.  Raises: EvaluationStopped: one of them is asked to stop; on all."""
        flags, stops = self.all_reduce(torch.tensor([flag, self.stop.is_set()], dtype=torch.float32)).tolist()
        if stops:
            raise EvaluationStopped
        return bool(flags)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.engine.all_reduce(tensor)


@dataclass
class Evaluation:
    """The measurements of a run.

    Attributes:
        table: the recipe's.
        reference: the real images.
        space: where single jumps are compared, if the recipe asks to diagnose.
        teacher_jumps: the distances of the teacher's single jumps, once they are known.
        decoder: from the product's images to pictures; a VAE is on the device only while it decodes.
        lowest: the lowest score so far of the first metric at the first number of steps, on the main process; None: it
            was not measured since the run began or resumed.
    """

    table: EvaluationTable
    reference: Dataset | ReferenceStatistics
    space: FeatureSpace | None = None
    decoder: Decoder = to_uint8
    lowest: float | None = None
    teacher_jumps: list[float] | None = None

    def is_due(self, run: Run) -> bool:
        """Returns whether the average is measured after this round."""
        return run.finished or run.due(self.table.every)

    def measure(self, run: Run, tell: Callable[[str], object], stop: Event) -> dict[str, float]:
        """Returns the metrics of the average, by quality_name; none where a sample is not finite.

        With `diagnose`, also those of Diagnosis.measures; none where one is not finite.

        Args:
            stop: set when the run is asked to stop.
        Raises: EvaluationStopped: it was set on some process.
        """
        measured: dict[str, float] = {}
        processes = StoppableProcesses(run.engine, stop)
        for nfe in self.table.nfe:
            try:
                with vae_on(run.engine.device, self.decoder):
                    result = evaluate(
                        run.model(),
                        self.reference,
                        protocol=self.table.protocol,
                        sampler=SamplerSpec(nfe=nfe),
                        seeds=range(self.table.n),
                        weights=self.table.weights,
                        decode=self.decoder,
                        device=run.engine.device,
                        processes=processes,
                        source_sha256="",  # shards have none
                    )
            except NotFiniteError as error:
                tell(f"Not measured after {counted(run.images, 'image')}: {error}.")
                continue
            measured |= {quality_name(name, nfe): value for name, value in result.metrics.items()}
        if self.space is None:
            return measured
        try:
            return measured | self._diagnose(run, self.space, lambda: processes.any_process(False)).measures()
        except NotFiniteError as error:
            tell(f"Not diagnosed after {counted(run.images, 'image')}: {error}.")
            return measured

    def _diagnose(self, run: Run, space: FeatureSpace, on_batch: Callable[[], object]) -> Diagnosis:
        """Returns the diagnosis of the average, with the run's own teacher and auxiliary score where it has them."""
        run.set_trainable(None)
        teacher, auxiliary = (run.networks.get(role) for role in ("teacher", "auxiliary"))
        given = self.reference if isinstance(self.reference, Dataset) and not run.config.latent else run.dataset
        with vae_on(run.engine.device, self.decoder):
            diagnosis = diagnose_networks(
                run.ema.network.eval(),
                teacher if isinstance(teacher, FlowNetwork) else None,
                auxiliary if isinstance(auxiliary, FlowNetwork) else None,
                given,
                space,
                reference=self.reference,
                decode=self.decoder,
                teacher_jumps=self.teacher_jumps,
                count=self.table.n,
                on_batch=on_batch,
            )
        self.teacher_jumps = [jump.teacher for jump in diagnosis.jumps if jump.teacher is not None]
        return diagnosis

    def keep_best(
        self, run: Run, folder: RunDir, measured: Mapping[str, float], tell: Callable[[str], object]
    ) -> list[Alarm]:
        """Saves the average in RUN/best if it is the best so far. All processes call it together.

        Returns: an alarm of the kind `quality` if it is far worse than the best.
        """
        key, value = next(iter(measured.items()), ("", 0.0))
        name, nfe = metric_and_nfe(key) or ("", 0)
        if nfe != self.table.nfe[0]:
            return []
        score, engine = loss_of(name, value), run.engine
        if self.lowest is None and engine.is_main:
            self.lowest = folder.lowest(key, partial(loss_of, name))
        before = math.inf if self.lowest is None else self.lowest
        if engine.broadcast(score < before):  # metrics.jsonl may be on the main process's disk alone
            self.lowest = score
            weights = engine.full_state(run.ema.network.network)
            engine.on_main(generator_saver(run, folder.best, weights))
            tell(f"After {counted(run.images, 'image')} {key} is {value:.4g}, the best so far: kept in {folder.best}.")
        elif engine.broadcast(0 < WORSE * before < score):
            change = f"After {counted(run.images, 'image')} {key} is {value:.4g}, and it was {before:.4g} at its best"
            sentence = f"{change}: training makes it worse, and {folder.best} keeps the best average."
            return [Alarm("quality", sentence, best=folder.best)]
        return []


def open_evaluation(run: Run) -> Evaluation | None:
    """Returns the measurements that a recipe asks for, before training begins; None: none.

    Raises: TrainingError: the run makes latents, and no pictures are named.  CheckpointError: the VAE is not here.
        EdmDistillError: no such protocol, reference or feature weights.
    """
    table = run.recipe.evaluation
    if not isinstance(table, EvaluationTable):
        return None
    standard = get_protocol(table.protocol)
    if table.diagnose and run.config.stage == "teacher":
        raise TrainingError(
            "evaluation.diagnose measures the jumps of a generator, and this run trains a teacher: leave it out"
        )
    given = table.ref or (None if standard.reference else run.dataset)
    if given is run.dataset and run.config.latent:
        raise TrainingError(
            "[evaluation] compares pictures, and this run's data are latents: name pictures, or statistics of them, by "
            "--set evaluation.ref=FILE, or remove the table and measure snapshots by `edmdistill eval RUN`"
        )
    reference = open_reference(given, standard)
    require_options(
        SamplerSpec(), table.weights, [find_metric(name, str(standard.features)) for name in standard.metrics]
    )
    name = standard.features
    space = None if name is None else load_features(name, table.weights.get(name), run.engine.device)
    decoder = run.decoder or open_decoder(run.config.encoder, run.vae, instead="remove [evaluation]")
    return Evaluation(table, reference, space if table.diagnose else None, decoder)
