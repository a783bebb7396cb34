"""Traces of a run's rounds: what each operation and kernel takes, for Perfetto or Chrome's trace viewer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from edmdistill.atomic import atomic_write
from edmdistill.errors import counted
from edmdistill.training.run import Run
from edmdistill.transfer import is_gpu

WARMUP = 3
"""Rounds before the first that is traced: code is compiled, libraries choose their kernels, the profiler starts."""
PROFILE = "profile"
"""Folder of the traces in a run directory."""


@contextmanager
def traced(
    run: Run, run_dir: Path, count: int | None, on_message: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Traces rounds of a run into RUN/profile/IMAGES-RANK.json, a file of each process; results stay as they are.

    Args:
        count: rounds to trace, after WARMUP others; None: none.
        on_message: gets a sentence for the user on the outcome.
    Yields: what is to be called after each round.
    Raises: CheckpointError: the disk refuses.
    """
    if count is None:
        yield lambda: None
        return
    files: list[Path] = []

    def write(profiler: profile) -> None:
        if profiler.step_num <= WARMUP:  # stopped before the first round was whole
            return
        files.append(run_dir / PROFILE / f"{run.images:012d}-{run.engine.rank}.json")
        with atomic_write(files[0]) as new:
            profiler.export_chrome_trace(str(new))

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its lines would break the progress bar
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_gpu(run.engine.device)]
    plan = schedule(wait=WARMUP - 1, warmup=1, active=count, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if files:
        on_message(
            f"The trace of up to {counted(count, 'round')} is in {files[0]}: open it in https://ui.perfetto.dev."
        )
    else:
        on_message(f"--profile wrote no trace: the run had no more than {WARMUP} rounds left to warm up.")
