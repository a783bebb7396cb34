"""GPUs by their data sheets: memory, and peak speed of matrix products."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

LAUNCH = 10e-6
"""Least seconds of one call of torch in eager mode, whatever it computes: 5 to 20 us, depending on the processor."""

UTILIZATION = 0.35
"""Share of a GPU's peak speed that networks reach."""

HERE = "this machine"
"""The name of what `measure_this_machine` returns, beside those of GPUS."""


class GPU(NamedTuple):
    """The bounds of a run's size and speed on a GPU.

    Attributes:
        memory: bytes.
        half: peak FLOP/s on dense tensor cores in bf16 and fp16.
        tf32: the same in TF32.
        single: peak FLOP/s in fp32, without tensor cores.
        launch: seconds of one call of torch.
    """

    memory: float
    half: float
    tf32: float
    single: float
    launch: float = LAUNCH

    def flops(self, precision: str) -> float:
        """Returns the peak FLOP/s in a precision of recipes."""
        return {"fp32": self.single, "tf32": self.tf32}.get(precision, self.half)


@cache
def measure_this_machine() -> GPU:
    """Returns the speed of the current GPU, or of the CPU, measured by matrix products and small calls."""
    import torch

    from edmdistill.kernels.linear import tf32_allowed
    from edmdistill.machine.host import host_memory

    gpu = torch.cuda.is_available()
    device, size, times = ("cuda", 4096, 4) if gpu else ("cpu", 512, 1)

    def seconds(act: Callable[[], object], times: int) -> float:
        act()
        best = math.inf
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(times):
                act()
            if gpu:
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - begin) / times)
        return best

    def rate(dtype: torch.dtype, tf32: bool = False) -> float:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        with tf32_allowed(tf32):
            return float(2 * size**3 / seconds(lambda: matrix @ matrix, times))

    small = torch.ones(1, device=device)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else host_memory()[0]
    launch = seconds(lambda: small + small, 1000)
    half, single = rate(torch.bfloat16), rate(torch.float32)
    return GPU(memory, half, rate(torch.float32, tf32=True) if gpu else single, single, max(launch, LAUNCH))


def find_gpu(name: str, memory: float) -> str | None:
    """Returns the key in GPUS of the device that CUDA calls `name`, with `memory` bytes; None: it is not listed."""
    flat = name.lower().replace(" ", "")
    for key, gpu in GPUS.items():
        word = key.removesuffix("-40").removesuffix("-80").replace("-", "")
        if word in flat and abs(memory / gpu.memory - 1) < 0.12:
            return key
    return None


# Source: NVIDIA's data sheets and architecture papers; SXM variants, no sparsity, fp32 accumulation.
GPUS = {
    "rtx4090": GPU(24e9, 165.2e12, 82.6e12, 82.6e12),
    "a100-40": GPU(40e9, 312e12, 156e12, 19.5e12),
    "l40s": GPU(48e9, 362e12, 183e12, 91.6e12),
    "rtx6000-ada": GPU(48e9, 364.2e12, 182.1e12, 91.1e12),
    "a100-80": GPU(80e9, 312e12, 156e12, 19.5e12),
    "h100": GPU(80e9, 989.4e12, 494.7e12, 66.9e12),
    "h200": GPU(141e9, 989.4e12, 494.7e12, 66.9e12),
    "b200": GPU(180e9, 2250e12, 1100e12, 80e12),
}
