"""The training loop: the turns of a method, round after round. It knows no method by name.

A round takes each turn once: one optimizer step of one role, on a batch of its own, with every other role frozen. Then
the averages of the method's product are updated. What is random in a turn depends on (seed, round, turn, row) alone,
and its data on their position in the stream of batches alone: a run that is resumed on the same machine makes the same
calls as one never interrupted, and so the same bits, on a GPU but for sums that its kernels take in no fixed order; and
however many processes share a batch, it is the same batch.

`images seen` counts one batch a round: those that the product learns from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.data.order import indices
from edmdistill.draws import Draws
from edmdistill.machine.compile import begin_step
from edmdistill.machine.engine import scale_gradients
from edmdistill.methods.base import Batch, Loss, Preview, Turn
from edmdistill.methods.pieces import Pieces
from edmdistill.networks.flow import FlowNetwork
from edmdistill.training.ema import update_average
from edmdistill.training.metrics import Measures, RowMeans
from edmdistill.training.monitors import Diverged, find_divergence, fingerprints, require_moved
from edmdistill.training.optimizers import learning_rate, set_learning_rate
from edmdistill.training.run import Run


def rounds(run: Run) -> Iterator[Measures]:
    """Trains, one round per iteration, until the recipe's images are seen.

    Yields: loss/ROLE and lr/ROLE of every turn, grad_norm/ROLE of every step that was taken, and what else `RowMeans`
        measures, over all processes.
    Raises: Diverged: something is no longer finite.  TrainingError: the first turn of a role did not move it alone.
    """
    training, turns = run.recipe.training, run.method.turns()
    with run.stream() as stream:
        batches = stream.batches(requests(run, turns))
        while run.images < training.images:
            measures: Measures = {}
            for index, turn in enumerate(turns):
                if run.images >= turn.begins:
                    measures |= take_turn(run, turn, index, batches)
            for average in run.averages:
                average.update(run.networks[run.method.product], run.images, training.batch)
            run.images += training.batch
            yield measures


def requests(run: Run, turns: Sequence[Turn]) -> Iterator[tuple[int, int]]:
    """Yields the positions [start, stop) in the stream of data of every micro-batch from here to the end, in order."""
    training = run.recipe.training
    for images in range(run.images, training.images, training.batch):
        for index, turn in enumerate(turns):
            start = images * len(turns) + index * training.batch
            for rows in run.micro_batches() if images >= turn.begins else ():
                yield start + rows.start, start + rows.stop


def take_turn(run: Run, turn: Turn, index: int, batches: Iterator[Batch]) -> Measures:
    """Takes one optimizer step of one role: turn `index` of a round, on the next batches.  Returns: its measures."""
    role, network, engine = turn.role, run.networks[turn.role], run.engine
    run.set_trainable(role)
    # One after the other: while the first still waits for a step that does not overflow, the next may have no gradient.
    before = fingerprints(run.networks, engine.all_reduce) if run.unchecked[:1] == [role] else None
    scale = run.scales.get(role)
    factor = 1.0 if scale is None else scale.scale
    means, micro_batches = accumulate_gradients(run, turn, index, batches, factor)
    means.add(f"grad_norm/{role}", engine.gradient_norm(network) / factor, 1)
    measures = means.means(engine.all_reduce)  # the device is waited for here and nowhere else

    # The step, unless half precision overflowed.
    norm = measures[f"grad_norm/{role}"]
    finite = math.isfinite(norm)
    if not math.isfinite(measures[f"loss/{role}"]) or not (finite or (scale and scale.can_shrink)):
        raise _divergence(run, role, index, micro_batches)
    measures[f"lr/{role}"] = rate = learning_rate(run.recipe.training, role, run.images)
    if finite:
        clip = run.recipe.training.grad_clip
        scale_gradients(network.parameters(), (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / factor)
        set_learning_rate(run.optimizers[role], rate)
        run.optimizers[role].step()
        if before is not None:
            require_moved(role, before, fingerprints(run.networks, engine.all_reduce))
            run.unchecked.remove(role)
        if isinstance(network, FlowNetwork):
            network.network.after_step()
        for name, other in run.recipe.roles.items():
            if other.ema_of is not None and other.ema_of.role == role:
                update_average(run.networks[name], network, other.ema_of.decay)
    else:
        del measures[f"grad_norm/{role}"]  # of a step that was not taken; a mean with it would be no number
    if scale is not None:
        scale.update(finite)
        measures[f"loss_scale/{role}"] = scale.scale
    run.optimizers[role].zero_grad(set_to_none=True)
    return measures


class MicroBatch(NamedTuple):
    """The rows of a batch that went through one forward and backward pass, and their loss."""

    rows: slice
    x0: Tensor
    loss: Loss


def accumulate_gradients(
    run: Run, turn: Turn, index: int, batches: Iterator[Batch], factor: float
) -> tuple[RowMeans, list[MicroBatch]]:
    """Adds up the gradient of `factor` times the mean loss over the batch's rows on all processes.

    Args: as for `take_turn`.
    """
    training, engine = run.recipe.training, run.engine
    network, module = run.networks[turn.role], run.role_modules[turn.role]
    slices = run.micro_batches()
    pieces = engine.machine.pieces(training.batch, engine.world_size, len(slices))
    run.method.pieces = Pieces(pieces, factor * engine.world_size / training.batch)

    def draws_of(rows: slice) -> Draws:
        draws = Draws([training.seed, run.images // training.batch, index], training.batch, rows, device=engine.device)
        if isinstance(network, FlowNetwork):
            network.draws = draws
        return draws

    begin_step(engine.machine.compile)  # no result of the previous turn is needed anymore
    means, micro_batches = RowMeans(), []
    with run.shared_weights():
        for rows, (batch, preview) in zip(slices, with_previews(run, turn, draws_of, batches), strict=True):
            draws = draws_of(rows)
            with engine.accumulate(module, last=rows is slices[-1]):
                loss = turn.loss(batch, draws) if preview is None else turn.loss(batch, draws, preview)
                share = len(draws) * engine.world_size / training.batch
                (loss.value.mean() * (share * factor)).backward()  # type: ignore[no-untyped-call]
            means.add_loss(turn.role, loss, batch, run.ema.network.sigma_data)
            micro_batches.append(MicroBatch(rows, batch.x0, loss))
    if isinstance(network, FlowNetwork):
        network.draws = None
    engine.finish_gradients(network)
    return means, micro_batches


def with_previews(
    run: Run, turn: Turn, draws_of: Callable[[slice], Draws], batches: Iterator[Batch]
) -> Iterator[tuple[Batch, Preview | None]]:
    """Yields a turn's next batches, each with its preview if the turn takes one, with means over the whole batch."""
    engine, size = run.engine, run.recipe.training.batch
    slices = run.micro_batches()
    if turn.preview is None:
        for _ in slices:
            yield next(batches)._replace(images=run.images), None
        return
    pairs: list[tuple[Batch, Preview]] = []
    means: dict[str, Tensor] = {}
    for rows in slices:
        batch = next(batches)._replace(images=run.images)
        with engine.accumulate(run.role_modules[turn.role], last=False):
            preview = turn.preview(batch, draws_of(rows))
        share = (rows.stop - rows.start) / size
        means = {name: means.get(name, 0) + share * mean for name, mean in preview.means.items()}
        pairs.append((batch, preview))
    means = {name: engine.all_reduce(mean) for name, mean in means.items()}
    for batch, preview in pairs:
        yield batch, preview._replace(means=means)


def _divergence(run: Run, role: str, index: int, micro_batches: list[MicroBatch]) -> Diverged:
    """Returns the error of turn `index`, whose loss or gradient is not finite, from the rows of all processes."""
    batch, engine, dataset = run.recipe.training.batch, run.engine, run.dataset
    value, t, bad = (torch.zeros(batch, dtype=torch.float64, device=engine.device) for _ in range(3))
    for rows, x0, loss in micro_batches:
        value[rows], t[rows] = loss.value.detach().double(), loss.t.double()
        bad[rows] = (~x0.isfinite().flatten(1).all(1)).double()
    bad_rows = engine.all_reduce(bad).nonzero().flatten().tolist()
    data = ""
    if bad_rows:
        position = run.images * len(run.method.turns()) + index * batch + bad_rows[0]
        image = int(indices(run.recipe.training.seed, position, 1, len(dataset)))
        data = f"{dataset.files[image % len(dataset.files)]} of {dataset.name}"
    frozen = [name for name, other in run.recipe.roles.items() if other.frozen]
    whole = Loss(engine.all_reduce(value), engine.all_reduce(t))
    return find_divergence(role, whole, run.networks, run.images, frozen, data)
