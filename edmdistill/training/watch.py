"""Signals of a run that no turn has: the weight of second times, and what a method measures in passes of its own.

They stand in every line of metrics.jsonl, but what needs passes only in one line of so many that its cost stays below
1% of the training.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed.tensor import DTensor

from edmdistill.draws import Draws
from edmdistill.networks.flow import FlowNetwork
from edmdistill.training.run import Run

ROWS = 32
"""Images of a method's own passes."""
ROUNDS = 100
"""Rounds between them at least. Measured on digits with batches of 32 and CoSIM: 0.4% of the time of the rounds."""


def signals(run: Run) -> dict[str, float]:
    """Returns the signals of this line of the metrics. Nothing that is trained depends on them.

    All processes call it together, and get the same numbers.
    """
    measures = {}
    for role in run.optimizers:
        network = run.networks[role]
        if isinstance(network, FlowNetwork) and network.network.second_time is not None:
            measures[f"gain/{role}"] = float(_whole(network.network.second_time.gain).detach())
    training, turns = run.recipe.training, len(run.method.turns())
    lines = math.ceil(ROUNDS * training.batch / training.log_every)
    if not run.finished and (run.images // training.log_every) % lines:
        return measures
    run.set_trainable(None)
    rows = min(ROWS, training.batch)
    start = run.images * turns
    batch = run.stream().read(start, start + rows)._replace(images=run.images)
    draws = Draws([training.seed, run.images // training.batch, turns], rows, device=run.engine.device)
    return measures | {name: float(value) for name, value in run.method.monitor(batch, draws).items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
