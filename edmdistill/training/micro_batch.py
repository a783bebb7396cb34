"""`--micro-batch auto`: the most images of one forward and backward pass that the GPU holds, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edmdistill.draws import Draws
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import local_shard
from edmdistill.methods.base import Batch
from edmdistill.training.probe import LATE
from edmdistill.training.run import Run, set_trainable

RESERVE = 0.05
"""Share of the GPU's memory that stays free, for fragments and for what other libraries take."""


def settle_micro_batch(run: Run) -> int | None:
    """Puts a number in the place of "auto".  Returns: that number, or None where one was given.

    All processes call it together. Sharded networks talk in every pass, so there all GPUs have to be alike: if one ran
    out of memory before the others, they would wait for it.
    Raises: TrainingError: there is no GPU, or not even one image fits.
    """
    engine, machine = run.engine, run.engine.machine
    if machine.micro_batch != "auto":
        return None
    engine.check_micro_batches(run.recipe.training.batch)
    share = -(-run.recipe.training.batch // engine.world_size)
    pieces = fewest_pieces(lambda pieces: not engine.any_process(not fits(run, -(-share // pieces))), share)
    if pieces is None:
        raise TrainingError(
            "not even one image fits into the GPU's memory: add --checkpoint-activations, --offload or --shard"
        )
    size = -(-share // pieces)
    engine.machine = machine._replace(micro_batch=size)
    return size


def fewest_pieces(fit: Callable[[int], bool], most: int) -> int | None:
    """The least number of pieces, `most` at most, that `fit`; more pieces fit where fewer do. None: none does."""
    high = 1
    while not fit(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2  # does not fit, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) else (middle, high)
    return high


def fits(run: Run, size: int) -> bool:
    """Whether every turn's gradient can be taken on `size` images, beside what the optimisers will hold."""
    engine, network = run.engine, run.ema.network
    shape = size, network.img_channels, network.img_resolution, network.img_resolution
    try:
        reserve = _to_come(run)  # noqa: F841  held while the turns are tried
        for turn in run.method.turns():
            set_trainable(run, turn.role)
            labels = torch.zeros(size, network.label_dim, device=engine.device) if network.label_dim else None
            batch = Batch(torch.zeros(shape, device=engine.device), labels, LATE)
            with engine.accumulate(run.role_modules[turn.role], last=False):
                turn.whole(batch, Draws(0, size, device=engine.device)).value.sum().backward()  # type: ignore[no-untyped-call]
            run.roles[turn.role].zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        for role in run.optimizers:
            run.roles[role].zero_grad(set_to_none=True)
        return False
    finally:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _to_come(run: Run) -> torch.Tensor:
    """Memory as large as what is not there yet: two numbers a parameter for each optimiser, and the reserve."""
    size = 0.0
    for role, optimizer in run.optimizers.items():
        if not optimizer.state and "optimizer" not in run.engine.machine.offload:
            size += sum(8 * local_shard(parameter).numel() for parameter in run.learnt[role].values())
    if run.engine.device.type == "cuda":
        size += RESERVE * torch.cuda.get_device_properties(run.engine.device).total_memory
    return torch.empty(int(size), dtype=torch.uint8, device=run.engine.device)
