"""The training loop: the turns of a method, round after round. It knows no method by name.

A round takes each turn once: one optimiser step of one role, on a batch of its own, with every other role frozen. Then
the averages of the method's product follow. What is random in a turn depends on (seed, round, turn, row) alone, and its
data on their position in the stream of batches alone: a run that is resumed on the same machine makes the same calls,
and so the same bits, as one never interrupted; and however many processes share a batch, it is the same batch.

`images seen` counts one batch a round: those that the product learns from.
"""

from __future__ import annotations

import errno
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edmdistill.checkpoints.layout import saved_states
from edmdistill.checkpoints.run_state import Progress
from edmdistill.data.datasets import indices
from edmdistill.draws import Draws
from edmdistill.errors import CheckpointError, DatasetError, PeerFailed, TrainingError
from edmdistill.machine.engine import scale_gradients
from edmdistill.machine.environment import environment, peak_memory
from edmdistill.methods.base import Batch, Loss, Preview, Turn
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.schema import Training
from edmdistill.training.ema import follow
from edmdistill.training.metrics import Measures, Tally, Window
from edmdistill.training.micro_batch import settle_micro_batch
from edmdistill.training.monitors import Diverged, Health, diverged, fingerprints, require_finite, require_moved
from edmdistill.training.optimizers import set_rate
from edmdistill.training.run import Run, set_trainable
from edmdistill.training.run_dir import RunDir, open_run
from edmdistill.training.snapshot import compare, draw, keep_averages, picture_path, publish
from edmdistill.training.state import State, newest_healthy, newest_whole, read_state, save_state, state_path
from edmdistill.training.trackers import trackers

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


ECHO = 0.5
"""Seconds within which a second signal is the first one's echo: some services tell a process and its launcher too."""


class Outcome(NamedTuple):
    """How `train` ended: at the recipe's end, or interrupted after `images`."""

    finished: bool
    images: int


def train(
    run: Run,
    run_dir: Path,
    *,
    recipe_text: str = "",
    stop_on: Collection[str] = (),
    on_start: Callable[[], object] = lambda: None,
    on_round: Callable[[int, Measures], object] = lambda images, measures: None,
    note: Callable[[str], object] = print,
) -> Outcome:
    """Trains to the recipe's end, from the run directory's last state if it has one.

    SIGINT and SIGTERM end the round in progress, save a state and return; the same call goes on from there.

    Args:
        run: from `prepare`; its networks are trained in place.
        run_dir: made if it is not there; see `run_dir`.
        recipe_text: the recipe as its author wrote it, kept in the directory.
        stop_on: kinds of alarm that end the run; see `monitors`.
        on_start: called once the directory is the run's own.
        on_round: hears of every round: images seen and what was measured.
        note: hears sentences for the user; on the main process alone.
    Raises: TrainingError: the directory belongs to another run or process, or training went wrong.  PeerFailed: the
        same on the other processes.
    """
    training, engine = run.recipe.training, run.engine
    with ExitStack() as stack:
        opened = open_run(run_dir, run.recipe.to_json(), run.identity, recipe_text)
        folder = engine.on_main(lambda: stack.enter_context(opened)) or RunDir(run_dir)
        stop = stack.enter_context(stop_on_signal(note if engine.is_main else lambda sentence: None))
        on_start()
        resumed = _resume(run, folder, note)
        window, health = (Window(), Health()) if resumed is None else (Window(resumed.window), Health(resumed.health))
        if resumed is not None and engine.is_main:
            finished = run.images >= training.images
            note(f"{'Finished already' if finished else 'Going on'} after {run.images:,} images.")
        if run.images == 0 or _is_snapshot(run):
            _draw(run, folder)
        engine.on_main(lambda: folder.forget_after(run.images, note))
        names = engine.machine.log_with
        track = engine.on_main(lambda: stack.enter_context(trackers(names, run_dir, run.recipe.tables(), run.images)))
        size = settle_micro_batch(run)
        if size is not None and engine.is_main:
            note(f"Micro-batches of {size} images fit.")
        try:
            if run.images < training.images:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                engine.on_main(lambda: folder.begin({"images": run.images, "began": now} | environment(engine)))
            for measures in rounds(run):
                window.add(measures)
                on_round(run.images, measures)
                last = run.images >= training.images
                if last or due(training.log_every, run):
                    line = window.line(run.images, training.batch)
                    line["memory"] = max(peak_memory(engine.device) - run.memory_before, 0)
                    engine.on_main(partial(folder.log, line))
                    if track is not None:
                        track(line)
                    for alarm in health.judge(line):
                        if engine.is_main and alarm.begins:
                            note(alarm.sentence)
                        if alarm.kind in stop_on:
                            raise Diverged(alarm.sentence)
                stopping = engine.any_process(stop.is_set())
                snapshot = _is_snapshot(run)
                every = run.recipe.ema.snapshot_every
                if every is not None and (last or due(every, run)):
                    keep_averages(run, folder.ema)  # first, so that a saved state has all averages up to it
                if snapshot or stopping:
                    _save(run, folder, window, health)
                if snapshot:
                    _draw(run, folder)
                if stopping:
                    break
        except Diverged as error:
            sentence = f"{str(error).rstrip('.')}; {_way_back(run, folder, health, error.advice)}"
            raise (TrainingError if engine.is_main else PeerFailed)(sentence) from error
        except DatasetError as error:
            raise TrainingError(
                f"{str(error).rstrip('.')}; if it has changed since the run began, put it back, and the same command "
                "goes on; a set with another in its place, or without it, needs another --run-dir"
            ) from error
        except (CheckpointError, OSError) as error:
            if not (isinstance(error, CheckpointError) or error.errno in DISK):
                raise
            newest = max(saved_states(folder.state), default=None)
            kept = f"goes on from {newest}" if newest else "begins anew"
            free = shutil.disk_usage(folder.path).free
            raise TrainingError(
                f"{str(error).rstrip('.')}, with {free / 1e6:.1f} MB free there: make room, and the same command {kept}"
            ) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU's memory is too small for this run ({str(error).partition('.')[0]}): add --micro-batch auto, "
                "--checkpoint-activations, --offload or --shard, and the same command goes on from the last state"
            ) from error
        except RuntimeError as error:
            if not engine.is_peer_loss(error):
                raise
            raise PeerFailed("another process of the run has ended") from error
    return Outcome(run.images >= training.images, run.images)


def rounds(run: Run) -> Iterator[Measures]:
    """Trains, a round a step, until the recipe's images are seen.

    Yields: loss/ROLE, grad_norm/ROLE and lr/ROLE of every turn, and what else `Tally` measures, over all processes.
    Raises: Diverged: something is no longer finite.  TrainingError: the first turn of a role did not move it alone.
    """
    training, turns = run.recipe.training, run.method.turns()
    with run.stream() as stream:
        batches = stream.follow(requests(run, turns))
        while run.images < training.images:
            measures: Measures = {}
            for index, turn in enumerate(turns):
                if run.images >= turn.begins:
                    measures |= take_turn(run, turn, index, batches)
            for average in run.averages:
                average.update(run.roles[run.method.product], run.images, training.batch)
            run.images += training.batch
            yield measures


def requests(run: Run, turns: Sequence[Turn]) -> Iterator[tuple[int, int]]:
    """The positions [start, stop) in the stream of data of every micro-batch from here to the end, in their order."""
    training = run.recipe.training
    for images in range(run.images, training.images, training.batch):
        for index, turn in enumerate(turns):
            start = images * len(turns) + index * training.batch
            for rows in run.engine.micro_batches(training.batch) if images >= turn.begins else ():
                yield start + rows.start, start + rows.stop


def take_turn(run: Run, turn: Turn, index: int, batches: Iterator[Batch]) -> Measures:
    """One optimiser step of one role: turn `index` of a round, on the next batches."""
    training, engine = run.recipe.training, run.engine
    network, optimizer, module = run.roles[turn.role], run.optimizers[turn.role], run.role_modules[turn.role]
    set_trainable(run, turn.role)
    # One after the other: while the first still waits for a step that does not overflow, the next may have no gradient.
    before = fingerprints(run.roles, engine.all_reduce) if run.unproven[:1] == [turn.role] else None

    # The gradient of the mean loss over the batch's rows on all processes, in micro-batches.
    scale = run.scales.get(turn.role)
    factor = 1.0 if scale is None else scale.scale
    tally, losses, sources, micro_batches = Tally(), [], [], engine.micro_batches(training.batch)
    entropy = [training.seed, run.images // training.batch, index]

    def drawn(rows: slice) -> Draws:
        draws = Draws(entropy, training.batch, rows, device=engine.device)
        if isinstance(network, FlowNetwork):
            network.draws = draws
        return draws

    seen = previewed(run, turn, drawn, batches)
    for rows in micro_batches:
        batch, preview = next(seen)
        draws = drawn(rows)
        with engine.accumulate(module, last=rows is micro_batches[-1]):
            loss = turn.loss(batch, draws) if preview is None else turn.loss(batch, draws, preview)
            share = len(draws) * engine.world_size / training.batch
            (loss.value.mean() * (share * factor)).backward()  # type: ignore[no-untyped-call]
        tally.add_loss(turn.role, loss, batch, run.ema.network.sigma_data)
        losses.append((rows, loss))
        sources.append((rows, batch.x0))
    if isinstance(network, FlowNetwork):
        network.draws = None
    engine.finish_gradients(network)
    tally.add(f"grad_norm/{turn.role}", engine.gradient_norm(network) / factor, 1)
    measures = tally.means(engine.all_reduce)  # the device is waited for here and nowhere else

    # The step, unless half precision overflowed.
    norm = measures[f"grad_norm/{turn.role}"]
    finite = bool(np.isfinite(norm))
    if not np.isfinite(measures[f"loss/{turn.role}"]) or not (finite or (scale and scale.can_shrink)):
        frozen = [role for role, part in run.recipe.roles.items() if part.frozen]
        data = _first_bad_image(run, index, sources)
        raise diverged(turn.role, _whole(losses, run), run.roles, run.images, frozen, data)
    measures[f"lr/{turn.role}"] = rate = learning_rate(training, turn.role, run.images)
    if finite:
        clip = 1.0 if training.grad_clip is None else min(1.0, training.grad_clip / (norm + 1e-6))
        scale_gradients(network.parameters(), clip / factor)
        set_rate(optimizer, rate)
        optimizer.step()
        if before is not None:
            require_moved(turn.role, before, fingerprints(run.roles, engine.all_reduce))
            run.unproven.remove(turn.role)
        if isinstance(network, FlowNetwork):
            network.network.after_step()
        for other, part in run.recipe.roles.items():
            if part.ema_of is not None and part.ema_of.role == turn.role:
                follow(run.roles[other], network, part.ema_of.decay)
    if scale is not None:
        scale.update(finite)
        measures[f"loss_scale/{turn.role}"] = scale.scale
    optimizer.zero_grad(set_to_none=True)
    return measures


def previewed(
    run: Run, turn: Turn, drawn: Callable[[slice], Draws], batches: Iterator[Batch]
) -> Iterator[tuple[Batch, Preview | None]]:
    """A turn's next batches, each with its preview if the turn takes one, its means those of the whole batch."""
    engine, size = run.engine, run.recipe.training.batch
    micro_batches = engine.micro_batches(size)
    if turn.preview is None:
        for _ in micro_batches:
            yield next(batches)._replace(images=run.images), None
        return
    pairs: list[tuple[Batch, Preview]] = []
    means: dict[str, Tensor] = {}
    for rows in micro_batches:
        batch = next(batches)._replace(images=run.images)
        with engine.accumulate(run.role_modules[turn.role], last=False):
            preview = turn.preview(batch, drawn(rows))
        share = (rows.stop - rows.start) / size
        means = {name: means.get(name, 0) + share * mean for name, mean in preview.means.items()}
        pairs.append((batch, preview))
    means = {name: engine.all_reduce(mean) for name, mean in means.items()}
    for batch, preview in pairs:
        yield batch, preview._replace(means=means)


def _whole(losses: list[tuple[slice, Loss]], run: Run) -> Loss:
    """The losses of all rows of the batch, of every micro-batch and process."""
    value, t = (torch.zeros(run.recipe.training.batch, dtype=torch.float64, device=run.engine.device) for _ in range(2))
    for rows, loss in losses:
        value[rows], t[rows] = loss.value.detach().double(), loss.t.double()
    return Loss(run.engine.all_reduce(value), run.engine.all_reduce(t))


def _first_bad_image(run: Run, index: int, sources: list[tuple[slice, Tensor]]) -> str:
    """Returns the name of the first image of turn `index` that is not finite, on any process; "": there is none."""
    training, turns = run.recipe.training, len(run.method.turns())
    bad = torch.zeros(training.batch, dtype=torch.float64, device=run.engine.device)
    for rows, x0 in sources:
        bad[rows] = (~x0.isfinite().flatten(1).all(1)).double()
    found = run.engine.all_reduce(bad).nonzero().flatten().tolist()
    if not found:
        return ""
    position = run.images * turns + index * training.batch + found[0]
    image = int(indices(training.seed, position, 1, len(run.dataset)))
    return f"{run.dataset.files[image % len(run.dataset.files)]} of {run.dataset.name}"


def _resume(run: Run, folder: RunDir, note: Callable[[str], object]) -> Progress | None:
    """Puts back the newest whole state.  Returns: what else it knows; None where there is no state."""
    newest = run.engine.on_main(lambda: newest_whole(folder.state, note))
    images = run.engine.broadcast(-1 if newest is None else int(newest.name))
    if images < 0:
        return None
    path = state_path(folder.state, images)
    state = read_state(path)
    try:
        run.restore(state.tensors, images)
        for role, scale in run.scales.items():
            scale.restore(state.progress.scales[role])
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the state {path} is not of this run, though the recipe and run.json say so: put {folder.path} back from "
            "a copy, or give another --run-dir"
        ) from error
    return state.progress


def _save(run: Run, folder: RunDir, window: Window, health: Health) -> None:
    """A state to go on from, and the average as a checkpoint ready for use."""
    training = run.recipe.training
    require_finite(run.roles, run.images, run.engine.any_process)
    scales = {role: scale.state() for role, scale in run.scales.items()}
    progress = Progress(
        images=run.images, window=window.progress(), scales=scales, health=health.begin_window(), sha256={}
    )
    tensors, weights = run.state(), run.engine.full_state(run.ema.network.network)

    def write() -> None:
        publish(run, folder.generator, weights)
        save_state(folder.state, State(progress, tensors), training.keep, training.keep_every)

    run.engine.on_main(write)


def _draw(run: Run, folder: RunDir) -> None:
    """Draws the pictures of a snapshot that are not there: a process may be killed between saving and drawing."""
    for picture, place in ((draw, folder.samples), (compare, folder.x0)):
        if not run.engine.broadcast(picture_path(place, run.images).exists()):
            picture(run, place)


def _is_snapshot(run: Run) -> bool:
    """Whether a state is saved here, and pictures are drawn."""
    return run.images >= run.recipe.training.images or due(run.recipe.training.snapshot_every, run)


def _way_back(run: Run, folder: RunDir, health: Health, advice: str | None) -> str:
    """Returns where a run that went wrong was last in good health, and what to do."""
    states, healthy = saved_states(folder.state), newest_healthy(folder.state, health.well)
    if advice is not None:
        return advice
    other = "try a lower training.lr in another --run-dir"
    if healthy is not None:
        how = f"as TEACHER, {healthy}" if run.method.product == "teacher" else f"by --init {healthy}"
        return f"the last good state is {healthy}; {other}, from its weights {how}, or from the start"
    if states:
        return f"no state before it was healthy, though {states[-1]} is finite; {other}"
    return f"no state was saved before it; {other}"


def learning_rate(training: Training, role: str, images: int) -> float:
    """The learning rate of a step before which `images` were seen.

    Source: EDM, training_loop.py, for the ramp-up; EDM2, eq. 67, for inverse_sqrt.
    Differs: the ramp-up counts the step's own batch too, so that the first step moves something.
    """
    rate = training.lr_by_role.get(role, training.lr)
    if training.lr_rampup_images:
        rate *= min(1.0, (images + training.batch) / training.lr_rampup_images)
    if training.lr_decay == "linear":
        rate *= min(1.0, (training.images - images) / (training.images * training.decay_share))
    if training.decay_images is not None:
        rate /= max(1.0, images / training.decay_images) ** 0.5
    return rate


def due(every: int, run: Run) -> bool:
    """Whether the last round crossed a multiple of `every` images."""
    return run.images // every > (run.images - run.recipe.training.batch) // every


@contextmanager
def stop_on_signal(note: Callable[[str], object]) -> Iterator[threading.Event]:
    """Gives an event that the first SIGINT or SIGTERM sets; a second one has its usual effect."""
    stop = threading.Event()
    asked: float | None = None
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = now
            stop.set()
            note("Stopping after this round; once more stops at once.")
        elif now - asked > ECHO:
            signal.signal(number, usual[signal.Signals(number)])
            signal.raise_signal(number)

    usual = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
