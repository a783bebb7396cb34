"""Which implementation an operation uses: torch's, or the Triton kernel beside it.

torch's is the default until a GPU has shown that a kernel pays: `benchmarks/gpu_check.py` compares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor

from edmdistill.errors import EdmDistillError

VARIABLE = "EDMDISTILL_KERNELS"
"""The environment variable that selects an implementation: torch or triton."""

BACKENDS = ("torch", "triton")


@contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Selects the implementation within a context: torch or triton.  Raises: EdmDistillError: it cannot be had."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        selected()
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def selected() -> str:
    """Returns the implementation in use: torch or triton.  Raises: EdmDistillError: it cannot be had."""
    backend = os.environ.get(VARIABLE) or "torch"
    if backend not in BACKENDS:
        raise EdmDistillError(f"{VARIABLE} is {backend}: set it to {' or '.join(BACKENDS)}, or unset it")
    if backend == "triton" and find_spec("triton") is None:
        raise EdmDistillError(f"{VARIABLE} is triton, which is not installed: pip install triton, or unset it")
    return backend


def uses_triton(x: Tensor) -> bool:
    """Returns whether an operation on x runs its Triton kernel: if it is selected, and x is on a GPU.

    Under TRITON_INTERPRET=1, Triton's interpreter runs the kernels on a CPU, for tests.
    """
    return selected() == "triton" and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
