"""`--micro-batch auto` and `--fit`: the largest micro-batch that fits into the GPU's memory, found by trial."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from edmdistill.draws import Draws
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import local_shard
from edmdistill.methods.base import Batch
from edmdistill.methods.pieces import Pieces
from edmdistill.training.optimizers import state_bytes
from edmdistill.training.probe import LATE
from edmdistill.training.run import Run
from edmdistill.transfer import is_gpu, is_out_of_memory

HEADROOM = 0.05
"""Share of the GPU's memory that stays free, for CUDA itself, other libraries and fragmentation."""

NO_ENGINE = "unable to find an engine"
"""Part of cuDNN's error where no algorithm of a convolution fits into memory. On a GPU that cuDNN does not support,
even one image ends in it."""


def settle_micro_batch(run: Run) -> int | None:
    """Replaces "auto" by a number, and that of a plan, on a GPU, by a smaller one if it does not fit.

    A plan has left the headroom, but does not know how memory will be fragmented. All processes call this together.
    Sharded networks communicate in every pass, so all GPUs must be alike there: if one ran out of memory before the
    others, they would wait for it.

    Returns: the new number; None: it is as it was.
    Raises: TrainingError: there is no GPU, or not even one image fits.
    """
    engine, machine = run.engine, run.engine.machine
    planned = machine.planned and is_gpu(engine.device)
    if machine.micro_batch != "auto" and not planned:
        return None
    group = run.recipe.group_size
    batch = run.recipe.training.batch
    engine.check_micro_batches(batch, group)
    share = -(-batch // group // engine.world_size)  # in groups
    least, headroom = (len(engine.micro_batches(batch, group)), 0.0) if planned else (1, HEADROOM)

    def fit(count: int) -> bool:
        return not engine.any_process(not fits(run, -(-share // count) * group, headroom))

    count = fewest_micro_batches(fit, least, share)
    if count is None:
        advice = "give --fit less memory" if planned else "add --checkpoint-activations, --offload or --shard"
        raise TrainingError(f"not even {fewest_fit(group)} in GPU memory: {advice}")
    size = -(-share // count) * group
    engine.machine = machine._replace(micro_batch=size)
    return None if planned and count == least else size


def fewest_micro_batches(fit: Callable[[int], bool], least: int, most: int) -> int | None:
    """Returns the smallest number of micro-batches in least..most that `fit`; None: none fits.

    Where fewer fit, more do.
    """
    low, high = least - 1, least
    while not fit(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) else (middle, high)
    return high


def fewest_fit(group: int) -> str:
    """Returns how a sentence goes on that says that not even one group of images fits."""
    return "one image fits" if group == 1 else f"{group} images fit"


def fits(run: Run, size: int, headroom: float = HEADROOM) -> bool:
    """Returns whether every turn's gradient on `size` images fits beside the states that optimizers will have.

    Args:
        headroom: share of the GPU's memory that has to stay free.
    """
    fitted = True
    try:
        with _uncompiled(run):
            _try_turns(run, size, headroom)
    except RuntimeError as error:
        if not is_out_of_memory(error) and (NO_ENGINE not in str(error) or size <= run.recipe.group_size):
            raise
        fitted = False
    # The error is gone by now, and with it the frames that held tensors: the next trial finds their memory free.
    for role in run.optimizers:
        run.networks[role].zero_grad(set_to_none=True)
    if not fitted:
        gc.collect()
    if is_gpu(run.engine.device):
        torch.cuda.empty_cache()
    return fitted


def _try_turns(run: Run, size: int, headroom: float) -> None:
    """Computes every turn's gradient on `size` images.  Raises: RuntimeError: see `is_out_of_memory`."""
    engine, network = run.engine, run.ema.network
    shape = size, network.img_channels, network.img_resolution, network.img_resolution
    reserved = _reserve_memory(run, headroom)  # noqa: F841  held while the turns are tried
    images = run.recipe.training.batch
    count = -(-images // engine.world_size // size)  # of such micro-batches
    run.method.pieces = Pieces(engine.machine.pieces(images, engine.world_size, count))
    for turn in dict.fromkeys(run.method.turns()):
        run.set_trainable(turn.role)
        labels = torch.zeros(size, network.label_dim, device=engine.device) if network.label_dim else None
        batch = Batch(torch.zeros(shape, device=engine.device), labels, LATE)
        with run.shared_weights(), engine.accumulate(run.role_modules[turn.role], last=False):
            turn.whole(batch, Draws(0, size, device=engine.device)).value.sum().backward()  # type: ignore[no-untyped-call]
        run.networks[turn.role].zero_grad(set_to_none=True)


def _uncompiled(run: Run) -> AbstractContextManager[object]:
    """Returns a context that runs no compiled code, so that none is made for a size that is only tried."""
    compiles = run.engine.machine.compile not in (None, "off")
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def _reserve_memory(run: Run, headroom: float) -> torch.Tensor:
    """Allocates what the optimizers have not allocated yet, and the headroom."""
    size = 0.0
    for role, optimizer in run.optimizers.items():
        if not optimizer.state and "optimizer" not in run.engine.machine.offload:
            each = state_bytes(run.recipe.training.of(role), run.engine.machine.second_moment)
            size += sum(each * local_shard(parameter).numel() for parameter in run.trainable[role].values())
    if is_gpu(run.engine.device):
        size += headroom * torch.cuda.get_device_properties(run.engine.device).total_memory
    return torch.empty(int(size), dtype=torch.uint8, device=run.engine.device)
