"""Torch's defaults and its random numbers, which are the user's: what they are inside the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def torch_as_it_starts() -> Iterator[None]:
    """Has torch's defaults as a process finds them while the block runs, and then as the user had them.

    Tensors are made on the CPU, in float32; gradients are recorded, and none are inference tensors. The default dtype
    is that of all threads; the rest is this thread's.
    """
    dtype = torch.get_default_dtype()
    elsewhere = torch.get_default_device().type != "cpu"  # only then: each operation asks a default device
    with torch.device("cpu") if elsewhere else nullcontext(), torch.inference_mode(False):  # and so with gradients
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


def as_tensor(value: Any) -> Tensor:
    """Returns a tensor as it is, and numbers on the CPU in numpy's dtype for them, whatever torch's defaults.

    Raises: TypeError, ValueError, RuntimeError: they are no numbers.
    """
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value), device="cpu")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes tensors on the CPU, and draws their random numbers from a seed; torch's own generators are left alone."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs, too
        yield
