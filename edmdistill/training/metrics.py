"""The measures of a run: means over the rows of a batch on all processes, and the lines of metrics.jsonl.

Names: loss/ROLE, loss/ROLE/sigma<EDGE by noise level, grad_norm/ROLE, lr/ROLE; generated/mean/CHANNEL and
generated/std/CHANNEL of the images that the generator made, data/... of the data beside them; diversity, the variance
of the generated images over the batch, as a share of the data's; memory, the peak so far in bytes on the main process:
its tensors on a GPU, else the growth of the process; METRIC/NFE NFE of [evaluation]; each method's own signals; and
those of `watch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from edmdistill.checkpoints.run_state import IntervalProgress
from edmdistill.methods.base import Batch, Loss
from edmdistill.trigflow import sigma_to_time

Measures = dict[str, float]

EDGES = (0.05, 0.2, 0.8, 3.0, 12.0)
"""Noise levels between the bins of losses."""
BINS = [*(f"sigma<{edge:g}" for edge in EDGES), f"sigma>={EDGES[-1]:g}"]


def quality_name(metric: str, nfe: int) -> str:
    """Returns the name of a metric that [evaluation] measures in so many network evaluations."""
    return f"{metric}/{nfe} NFE"


def metric_and_nfe(name: str) -> tuple[str, int] | None:
    """Returns the metric and the number of evaluations of a quality_name; None: it is another measure's."""
    metric, _, rest = name.rpartition("/")
    steps, _, unit = rest.partition(" ")
    return (metric, int(steps)) if unit == "NFE" and steps.isdecimal() else None


class RowMeans:
    """Means over rows: sums and counts, added up over micro-batches and then over processes.

    Everything stays on the device until `means`, which waits for the device once.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def add(self, names: str | Sequence[str], total: Tensor, count: Tensor | float) -> None:
        """Adds sums over rows to those of these names.

        Args:
            total, count: by name.  [names], or [] for a single name; a count may be the same for all.
        """
        key = (names,) if isinstance(names, str) else tuple(names)
        total = total.detach().to(torch.float64).reshape(-1)
        # A number is filled in on the device: a tensor made of it here would be copied there, and waited for.
        counts = count.to(total).reshape(-1) if isinstance(count, Tensor) else total.new_full((1,), count)
        counts = counts.expand(len(key))
        if key in self._sums:
            old_total, old_counts = self._sums[key]
            total, counts = old_total + total, old_counts + counts
        self._sums[key] = total, counts

    def add_loss(self, role: str, loss: Loss, batch: Batch, sigma_data: float) -> None:
        """Adds the measures of a micro-batch's loss."""
        value, rows = loss.value.detach().double(), len(loss.value)
        self.add(f"loss/{role}", value.sum(), rows)
        bins = torch.bucketize(loss.t.detach().double(), _edges(sigma_data, value.device), right=True)
        sums = value.new_zeros(2, len(BINS)).index_add_(1, bins, torch.stack([value, torch.ones_like(value)]))
        self.add([f"loss/{role}/{name}" for name in BINS], sums[0], sums[1])
        for name, signal in loss.signals.items():
            self.add(name, signal.double() * rows, rows)
        if loss.generated is not None:
            self._add_images(loss.generated, batch.x0)

    def _add_images(self, generated: Tensor, data: Tensor) -> None:
        both = torch.stack([generated, data.to(generated)])  # [2,B,C,H,W]
        mean, square = both.mean((1, 3, 4)), both.square().mean((1, 3, 4))
        channels = range(both.shape[2])
        for kind, total in (("mean", mean), ("square", square)):
            names = [f"{what}/{kind}/{channel}" for what in ("generated", "data") for channel in channels]
            self.add(names, total * both.shape[1], both.shape[1])
        # One image has no variance. The name is added all the same: processes may have one row, and several.
        rows = both.shape[1] if both.shape[1] > 1 else 0
        spread = both.var(1).mean((1, 2, 3)) if rows else both.new_zeros(2)
        self.add("diversity", spread[0] / spread[1].clamp(min=1e-12) * rows, rows)

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Measures:
        """Returns the mean of every name that has rows.

        Args:
            reduce: sums a tensor over processes, all of which have added the same names in the same order.
        """
        totals, counts = (torch.cat(parts) for parts in zip(*self._sums.values(), strict=True))
        total, count = reduce(torch.stack([totals, counts])).tolist()
        names = [name for key in self._sums for name in key]
        means = {name: a / b for name, a, b in zip(names, total, count, strict=True) if b}
        for name in [name for name in means if "/square/" in name]:
            mean = means[name.replace("square", "mean")]
            means[name.replace("square", "std")] = max(means.pop(name) - mean**2, 0.0) ** 0.5
        return means


@cache
def _edges(sigma_data: float, device: torch.device) -> Tensor:
    return sigma_to_time(torch.tensor(EDGES, dtype=torch.float64), sigma_data).to(device)


class IntervalMeans:
    """Means over the rounds since the last line of metrics.jsonl; of each name, over the rounds in which it occurs.

    Args:
        past: what `progress` returned, to resume from; the time in between does not count.
    """

    def __init__(self, past: IntervalProgress | None = None) -> None:
        past = past or IntervalProgress()
        self.sums, self.counts = dict(past.sums), dict(past.counts)
        self.rounds = past.rounds
        self.seconds = past.seconds
        self.before = past.before  # seconds up to the last line
        self._clock = time.perf_counter()

    def add(self, measures: Measures) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        for name, value in measures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.rounds += 1

    def line(self, images: int, batch: int) -> dict[str, float]:
        """Returns images, step, seconds since the run began, images_per_second and all means."""
        seconds, speed = self.before + self.seconds, self.rounds * batch / self.seconds
        line = {"images": images, "step": images // batch, "seconds": seconds, "images_per_second": speed}
        line |= {name: total / self.counts[name] for name, total in self.sums.items()}
        return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in line.items()}

    def begin(self) -> None:
        """Begins the next interval: the line of this one is written."""
        self.before += self.seconds
        self.sums, self.counts, self.rounds, self.seconds = {}, {}, 0, 0.0

    def progress(self) -> IntervalProgress:
        """Returns what `IntervalMeans` resumes from; rounds that are added later do not change it."""
        return IntervalProgress(dict(self.sums), dict(self.counts), self.rounds, self.seconds, self.before)
