"""The training loop: the turns of a method, round after round. It knows no method by name.

A round takes each turn once: one optimiser step of one role, on a batch of its own, with every other role frozen. Then
the average of the method's product follows. What is random in a turn hangs on (seed, round, turn) alone, and its data
on its position in the stream of batches alone: a run that is resumed is the run never interrupted, bit for bit.

`images seen` counts one batch a round: those that the product learns from.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from edmdistill.data.datasets import indices
from edmdistill.draws import Draws
from edmdistill.errors import TrainingError
from edmdistill.methods.base import Batch, Turn
from edmdistill.recipes import Training
from edmdistill.training.metrics import Measures, Window
from edmdistill.training.monitors import Diverged, diverged, fingerprints, require_finite, require_moved
from edmdistill.training.run import Run
from edmdistill.training.run_dir import open_run
from edmdistill.training.snapshot import draw, publish
from edmdistill.training.state import State, load_state, save_state, saved_states


class Outcome(NamedTuple):
    """How `train` ended: at the recipe's end, or interrupted after `images`."""

    finished: bool
    images: int


def train(
    run: Run,
    run_dir: Path,
    *,
    recipe_text: str = "",
    on_round: Callable[[int, Measures], object] = lambda images, measures: None,
    note: Callable[[str], object] = print,
) -> Outcome:
    """Trains to the recipe's end, from the run directory's last state if it has one.

    SIGINT and SIGTERM end the round in progress, save a state and return; the same call goes on from there.

    Args:
        run: from `prepare`; its networks are trained in place.
        run_dir: made if it is not there; see `run_dir`.
        recipe_text: the recipe as its author wrote it, kept in the directory.
        on_round: hears of every round: images seen and what was measured.
        note: hears sentences for the user.
    Raises: TrainingError: the directory belongs to another run or process, or training went wrong.
    """
    training = run.recipe.training
    with open_run(run_dir, run.recipe.to_json(), run.identity, recipe_text) as folder, stop_on_signal(note) as stop:
        window = Window()
        state = load_state(folder.state, note)
        if state is None:
            draw(run, folder.samples)
        else:
            run.restore(state.tensors, state.progress["images"])
            window = Window(**state.progress["window"])
            finished = run.images >= training.images
            note(f"{'Finished already' if finished else 'Going on'} after {run.images:,} images.")
        folder.forget_after(run.images)

        try:
            for measures in rounds(run):
                window.add(measures)
                on_round(run.images, measures)
                last = run.images >= training.images
                if last or _due(training.log_every, run):
                    folder.log(window.line(run.images, training.batch))
                snapshot = last or _due(training.snapshot_every, run)
                if snapshot or stop.is_set():
                    require_finite(run.roles, run.images)
                    publish(run, folder.generator)
                    progress = {"images": run.images, "window": window.progress()}
                    save_state(folder.state, State(progress, run.state()), training.keep)
                if snapshot:
                    draw(run, folder.samples)
                if stop.is_set():
                    break
        except Diverged as error:
            states = saved_states(folder.state)
            kept = f"the last good state is {states[-1]}" if states else "no state was saved before it"
            raise TrainingError(f"{error}; {kept}; try a lower training.lr in another --run-dir") from error
    return Outcome(run.images >= training.images, run.images)


def rounds(run: Run) -> Iterator[Measures]:
    """Trains, a round a step, until the recipe's images are seen.

    Yields: loss/ROLE, grad_norm/ROLE and lr/ROLE of every turn, and the method's own signals.
    Raises: Diverged: something is no longer finite.  TrainingError: the first turn of a role did not move it alone.
    """
    turns = run.method.turns()
    while run.images < run.recipe.training.images:
        measures: Measures = {}
        for index, turn in enumerate(turns):
            measures |= take_turn(run, turn, index, len(turns))
        run.ema.update(run.roles[run.method.product], run.images, run.recipe.training.batch)
        run.images += run.recipe.training.batch
        yield measures


def take_turn(run: Run, turn: Turn, index: int, turns: int) -> Measures:
    """One optimiser step of one role: turn `index` of the `turns` of a round."""
    training, network, optimizer = run.recipe.training, run.roles[turn.role], run.optimizers[turn.role]
    for role, other in run.roles.items():
        if other.training != (role == turn.role):  # two walks over its modules
            other.train(role == turn.role).requires_grad_(role == turn.role)
    before = fingerprints(run.roles) if run.images == 0 else None

    # What is random, and the data.
    number = run.images // training.batch
    draws = Draws([training.seed, number, index], training.batch, device=run.device)
    torch.manual_seed(draws.seed)  # dropout draws from the global generator
    batch = load_batch(run, (number * turns + index) * training.batch)

    # The gradient.
    loss = turn.loss(batch, draws)
    mean = loss.value.mean()
    mean.backward()  # type: ignore[no-untyped-call]
    norm = get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    # The device is waited for here and nowhere else.
    values = torch.stack([mean.detach(), norm, *loss.signals.values()]).tolist()
    if not np.isfinite(values[:2]).all():
        raise diverged(turn.role, loss, run.roles, run.images, network.sigma_data)
    if training.grad_clip is not None:
        clip_grads_with_norm_(network.parameters(), training.grad_clip, norm)

    # The step.
    rate = learning_rate(training, turn.role, run.images)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    if before is not None:
        require_moved(turn.role, before, fingerprints(run.roles))
    optimizer.zero_grad(set_to_none=True)
    network.network.after_step()
    names = [f"loss/{turn.role}", f"grad_norm/{turn.role}", *loss.signals]
    return dict(zip(names, values, strict=True)) | {f"lr/{turn.role}": rate}


def load_batch(run: Run, position: int) -> Batch:
    """The batch at a position of the endless stream of shuffled epochs."""
    training = run.recipe.training
    x0, labels = run.dataset.tensors(indices(training.seed, position, training.batch, len(run.dataset)))
    if labels is not None:
        labels = labels.to(run.device) if run.ema.network.label_dim else None
    return Batch(x0.to(run.device), labels)


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


def _due(every: int, run: Run) -> bool:
    """Whether the last round crossed a multiple of `every` images."""
    return run.images // every > (run.images - run.recipe.training.batch) // every


@contextmanager
def stop_on_signal(note: Callable[[str], object]) -> Iterator[threading.Event]:
    """Gives an event that the first SIGINT or SIGTERM sets; a second one has its usual effect."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        note("Stopping after this round; once more stops at once.")
        signal.signal(number, usual[signal.Signals(number)])

    usual = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
