"""A training session: opens the run directory, resumes, trains, and logs and saves at the recipe's intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from edmdistill.arguments import checked
from edmdistill.atomic import expanded
from edmdistill.checkpoints.run_state import Progress
from edmdistill.errors import counted
from edmdistill.machine.environment import environment, peak_memory
from edmdistill.machine.signals import stop_on_signal
from edmdistill.threads import Background
from edmdistill.training.faults import explain_errors
from edmdistill.training.loop import rounds
from edmdistill.training.measure import Evaluation, EvaluationStopped, open_evaluation
from edmdistill.training.metrics import IntervalMeans, Measures
from edmdistill.training.micro_batch import settle_micro_batch
from edmdistill.training.monitors import Diverged, Health, require_finite
from edmdistill.training.resume import resume
from edmdistill.training.run import Run
from edmdistill.training.run_dir import RunDir, open_run
from edmdistill.training.snapshot import generator_saver, save_ema_snapshots, save_grids
from edmdistill.training.state import State, save_state
from edmdistill.training.trackers import Trackers, trackers
from edmdistill.training.watch import signals
from edmdistill.transfer import is_gpu


class Outcome(NamedTuple):
    """How `train` ended: at the recipe's end, or interrupted after `images`."""

    finished: bool
    images: int


@checked
def train(
    run: Run,
    run_dir: str | Path,
    *,
    recipe_text: str = "",
    stop_on: Collection[str] = (),
    on_start: Callable[[], object] = lambda: None,
    on_round: Callable[[int, Measures], object] = lambda images, measures: None,
    on_message: Callable[[str], object] = print,
) -> Outcome:
    """Trains to the recipe's end, from the run directory's last state if it has one.

    After SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, finishes the current round, or gives up the evaluation after it,
    saves a state and returns; the same call resumes there, with that evaluation.

    Args:
        run: from `prepare`; its networks are trained in place.
        run_dir: made if it does not exist; see `run_dir`.
        recipe_text: the recipe as its author wrote it, kept in the directory.
        stop_on: kinds of alarm that end the run; see `monitors`.
        on_start: called once the directory is locked for this run.
        on_round: called after every round with images seen and its measures.
        on_message: gets sentences for the user, on the main process alone.
    Raises: TrainingError: the directory belongs to another run or process, or training went wrong.  PeerFailed: the
        same on the other processes.
    """
    run_dir, engine = expanded(run_dir), run.engine
    tell = on_message if engine.is_main else lambda sentence: None
    evaluation = run.evaluation or open_evaluation(run)
    with ExitStack() as stack:
        opened = open_run(run_dir, run.recipe.to_json(), run.identity, recipe_text)
        folder = engine.on_main(lambda: stack.enter_context(opened)) or RunDir(run_dir)
        stop = stack.enter_context(stop_on_signal(tell))
        on_start()
        if not folder.locked:
            tell(f"{run_dir} is on a disk without locks: train in it by one command at a time.")
        progress = resume(run, folder, tell)
        means, health = IntervalMeans(), Health()
        if progress is not None:
            means, health = IntervalMeans(progress.window), Health(progress.health)
        in_evaluation = has_line(run, means)  # where the run was stopped
        unfinished = in_evaluation or not run.finished
        if progress is not None:
            tell(f"{'Going on' if unfinished else 'Finished already'} after {counted(run.images, 'image')}.")
        written = run.images - 1 if in_evaluation else run.images
        engine.on_main(lambda: folder.truncate_after(written, tell))
        names = engine.machine.log_with
        track = engine.on_main(lambda: stack.enter_context(trackers(names, run_dir, run.recipe.tables(), written)))
        if run.images == 0 or is_snapshot(run):
            with explain_errors(run, folder, health):
                draw_grids(run, folder, tell, track)
        if (size := settle_micro_batch(run)) is not None:
            tell(
                f"Micro-batches of {counted(size, 'image')} "
                f"fit{', those of the plan do not' if engine.machine.planned else ''}."
            )
        session = Session(run, folder, means, health, track, stop_on, tell, stop, evaluation)
        with explain_errors(run, folder, health), closing(session.background):
            if unfinished:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                engine.on_main(lambda: folder.log_session({"images": run.images, "began": now} | environment(engine)))
            if not (in_evaluation and session.end_round()):
                for measures in rounds(run):
                    means.add(measures)
                    on_round(run.images, measures)
                    if session.end_round():
                        break
            engine.on_main(session.background.finish)
    return Outcome(run.finished and not has_line(run, means), run.images)


@dataclass
class Session:
    """The work between two rounds of a run, in its directory.

    Attributes:
        track: TensorBoard and others; None on all processes but the main one.
        stop_on, tell: as `stop_on` and `on_message` of `train`.
        stop: set when the run is asked to stop.
    """

    run: Run
    folder: RunDir
    means: IntervalMeans
    health: Health
    track: Trackers | None
    stop_on: Collection[str]
    tell: Callable[[str], object]
    stop: Event
    evaluation: Evaluation | None = None
    background: Background = field(default_factory=Background)

    def end_round(self) -> bool:
        """Logs and saves what is due after a round.  Returns: whether the run was asked to stop, and is saved."""
        try:
            self.log()
        except EvaluationStopped:  # the state has the interval whose line is missing, so the run resumes with that line
            self._save_state()
            return True
        stopping = self.run.engine.any_process(self.stop.is_set())
        self.save(stopping)
        return stopping

    def log(self) -> None:
        """Writes a line of metrics if one is due, and checks the run's health by it.

        With [evaluation], it also measures the average where that is due; the numbers are in the same line.
        Raises: Diverged: an alarm of `stop_on`.  EvaluationStopped: the run is asked to stop; nothing was written.
        """
        run = self.run
        if not has_line(run, self.means):
            return
        run.engine.on_main(self.folder.require_there)
        line = self.means.line(run.images, run.recipe.training.batch)
        line |= signals(run)
        line["memory"] = max(peak_memory(run.engine.device) - run.memory_before, 0)
        alarms = []
        if self.evaluation is not None and self.evaluation.is_due(run):
            measured = self.evaluation.measure(run, self.tell, self.stop)
            alarms = self.evaluation.keep_best(run, self.folder, measured, self.tell)
            line |= measured
        run.engine.on_main(partial(self.folder.log, line))
        self.means.begin()
        if self.track is not None:
            self.track.log(line)
        for alarm in (*self.health.check(line), *alarms):
            if alarm.kind in self.stop_on:
                raise Diverged(alarm.sentence, best=alarm.best)
            if alarm.begins:
                self.tell(alarm.sentence)

    def save(self, stopping: bool) -> None:
        """Saves what is due: snapshots of averages, a state with the generator, and grids.

        Args:
            stopping: the run is interrupted here, which needs a state.
        Raises: Diverged: a weight is not finite.  CheckpointError, OSError: the disk refuses.
        """
        run, every = self.run, self.run.recipe.ema.snapshot_every
        keeps_averages = every is not None and (run.finished or run.due(every))
        if keeps_averages or is_snapshot(run) or stopping:
            run.engine.on_main(self.folder.require_there)
        if keeps_averages:
            save_ema_snapshots(run, self.folder.ema)  # first, so that a saved state has all averages up to it
        if is_snapshot(run) or stopping:
            self._save_state()
        if is_snapshot(run):
            draw_grids(run, self.folder, self.tell, self.track)

    def _save_state(self) -> None:
        run, training = self.run, self.run.recipe.training
        require_finite(run.networks, run.images, run.engine.any_process)
        progress = Progress(
            images=run.images,
            window=self.means.progress(),
            scales={role: scale.state() for role, scale in run.scales.items()},
            health=self.health.begin_interval(),
            sha256={},
        )
        state, weights = State(progress, run.state()), run.engine.full_state(run.ema.network.network)
        save_product = generator_saver(run, self.folder.generator, weights)

        def write() -> None:
            save_product()
            save_state(self.folder.state, state, training.keep, training.keep_every)

        # What has come down from a GPU is a copy; on a CPU, the next step would change it.
        beside = is_gpu(run.engine.device)
        run.engine.on_main(partial(self.background.begin, write) if beside else write)


def draw_grids(run: Run, folder: RunDir, tell: Callable[[str], object], track: Trackers | None) -> None:
    """Draws a snapshot's grids that do not exist yet, and shows them to the trackers."""
    drawn = save_grids(run, folder, tell)
    if track is not None:
        track.show(drawn, run.images)


def has_line(run: Run, means: IntervalMeans) -> bool:
    """Returns whether a line of metrics is due, and is not yet written."""
    return means.rounds > 0 and (run.finished or run.due(run.recipe.training.log_every))


def is_snapshot(run: Run) -> bool:
    """Returns whether a state and grids are due."""
    return run.finished or run.due(run.recipe.training.snapshot_every)
