"""What the benchmarks share: times of calls that take turns; calls of torch, traffic and memory; tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of torch's profiler, which else prints two lines each time it runs

Row = dict[str, Any]
Call = Callable[[], object]


def seconds(call: Call, device: str = "cpu", wall: bool = False) -> float:
    """Returns what a call takes: CPU time on a CPU, which others share, but if `wall`; wall time elsewhere."""
    if device == "cpu":
        clock = time.perf_counter if wall else time.process_time
        start = clock()
        call()
        return clock() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Times(NamedTuple):
    """Seconds of calls that took turns, so that whatever slows the machine slows all: [rounds] each."""

    of: dict[str, np.ndarray]

    def ms(self, name: str) -> float:
        """Returns the median in milliseconds."""
        return float(1e3 * np.median(self.of[name]))

    def ratio(self, name: str, over: str, digits: int = 2) -> str:
        """Returns the median of the ratios in a round, and their range without the extreme ones: ".82 [.80, .85]"."""
        ratios = sorted(self.of[name] / self.of[over])
        cut = 1 if len(ratios) > 4 else 0
        median, low, high = (f"{x:.{digits}f}" for x in (np.median(ratios), ratios[cut], ratios[-1 - cut]))
        return f"{median} [{low}, {high}]"


def interleaved(calls: Mapping[str, Call], rounds: int = 7, device: str = "cpu", wall: bool = False) -> Times:
    """Returns the times of calls in rounds, each in the reverse order of the one before, after one to warm up."""
    names, times = list(calls), []
    for index in range(rounds + 1):
        order = names if index % 2 else names[::-1]
        row = {name: seconds(calls[name], device, wall) for name in order}
        times.append([row[name] for name in names])
    return Times(dict(zip(names, np.array(times[1:]).T, strict=True)))


class Counter(TorchDispatchMode):
    """Counts operations, backward passes included, and the bytes that they read and write; views cost nothing."""

    calls = 0
    traffic = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def counted(call: Call) -> Row:
    """Returns the number of operations of a call, and their traffic."""
    with Counter() as counter:
        call()
    return {"calls": counter.calls, "traffic MB": round(counter.traffic / 1e6, 1)}


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """Returns the peak memory of a call, beyond what is allocated before it; on a GPU, with that."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def table(rows: Sequence[Row]) -> str:
    """Returns rows as a table in Markdown; a row need not have every column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
