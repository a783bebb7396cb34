"""What the metrics of 50,000 images cost, in features of Inception's size: time, and peak memory.

    python benchmarks/metrics.py [--real 10000] [--generated 50000] [--dim 2048] [--only frechet_distance ...]

The features are random, made batch by batch as an evaluation does, and their making is not counted. Each metric runs in
a process of its own. CPU seconds over the number of cores is the time on a machine that does nothing else.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from edmdistill.evaluation.frechet import RunningStatistics, frechet_distance
from edmdistill.evaluation.kernel_distance import kernel_distance
from edmdistill.evaluation.manifold import density_coverage, precision_recall
from edmdistill.progress import set_quiet

BATCH = 256


def batches(count: int, dim: int, seed: int) -> Iterator[Tensor]:
    """Yields features like Inception's: not negative, and correlated.  float32 [BATCH,dim]"""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, dim, generator=torch.Generator().manual_seed(0)) / 8
    for start in range(0, count, BATCH):
        shape = min(BATCH, count - start)
        common, private = torch.randn(shape, 64, generator=generator), torch.randn(shape, dim, generator=generator)
        yield (common @ mix + 0.5 * private + 0.01 * seed).relu()


class Clock:
    """Sums up wall and CPU seconds over blocks."""

    wall = cpu = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def statistics_and_distance(real: int, generated: int, dim: int, clock: Clock) -> float:
    """The statistics of the generated features, and their distance to a reference."""
    reference, running = RunningStatistics(), RunningStatistics()
    for batch in batches(dim + 1000, dim, seed=0):
        reference.update(batch)
    theirs = reference.finish()
    for batch in batches(generated, dim, seed=1):
        with clock:
            running.update(batch)
    with clock:
        return frechet_distance(running.finish(), theirs)


def compared(function: Callable[[Tensor, Tensor], object]) -> Callable[[int, int, int, Clock], object]:
    def measure(real: int, generated: int, dim: int, clock: Clock) -> object:
        x, y = torch.empty(real, dim), torch.empty(generated, dim)
        for seed, out in enumerate((x, y)):
            for start, batch in zip(range(0, len(out), BATCH), batches(len(out), dim, seed), strict=True):
                out[start : start + BATCH] = batch
        with clock:
            return function(x, y)

    return measure


METRICS = {
    "frechet_distance": statistics_and_distance,
    "kernel_distance": compared(kernel_distance),
    "precision_recall": compared(precision_recall),
    "density_coverage": compared(density_coverage),
}


def run(name: str, real: int, generated: int, dim: int) -> str:
    """Returns a line on one metric."""
    set_quiet(True)
    clock = Clock()
    value = METRICS[name](real, generated, dim, clock)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cores = torch.get_num_threads()
    return f"{name:18} {clock.wall:8.1f} s {clock.cpu:8.1f} CPU s on {cores} cores {memory:6.2f} GiB   {value}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--generated", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--only", nargs="+", choices=METRICS, default=list(METRICS))
    args = parser.parse_args()
    print(f"{args.real:,} real and {args.generated:,} generated images, {args.dim} features")
    for name in args.only:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(pool.submit(run, name, args.real, args.generated, args.dim).result(), flush=True)
