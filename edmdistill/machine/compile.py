"""Compiles the blocks of networks by torch.compile: it fuses operations, and its CUDA graphs save kernel launches.

Blocks of equal shapes share compiled code, in all networks of the process. Weights, their names, and what is saved stay
as they are. Each kind of pass has code of its own: with gradients or without, with tangents, for another batch size.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, counted
from edmdistill.kernels.backend import VARIABLE, selected
from edmdistill.machine.launch import process_rank
from edmdistill.networks.base import Conditioning, Network
from edmdistill.networks.flow import Denoiser
from edmdistill.progress import INTERVAL, write
from edmdistill.recipes.schema import CompileMode
from edmdistill.sampling.spec import SamplerSpec

CUDA_GRAPHS = "reduce-overhead", "max-autotune"
"""The modes of torch.compile that make CUDA graphs on a GPU."""
BACKEND = "inductor"
"""The backend of torch.compile."""
MOST_KINDS = 64
"""Most kinds of pass through blocks of equal shapes. torch's own limit is 8."""


def require_compiler(mode: CompileMode, device: torch.device) -> None:
    """Compiles one operation, to see that it works.

    Raises: EdmDistillError: it does not, or the mode would do nothing on this device.
    """
    if mode == "off":
        return
    if device.type == "cpu" and mode in CUDA_GRAPHS:
        raise EdmDistillError(f"--compile {mode} is for GPUs, and this is on the CPU: use default, or off")
    if selected() == "triton":
        raise EdmDistillError(f"--compile does not work with {VARIABLE}=triton: unset it, or use --compile off")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise EdmDistillError(
            f"--compile needs a C++ compiler, and there is no {compiler} here: install one (apt-get install g++), set "
            "CXX to one, or use --compile off"
        )
    try:
        torch.compile(torch.sin, mode=mode, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of whatever it needs: compilers, headers, Triton, a place for its cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EdmDistillError(
            f"torch.compile does not work here ({reason}): install a C++ compiler and Python's headers (apt-get "
            "install g++ python3-dev), or use --compile off"
        ) from error


def compile_blocks(network: Network, mode: CompileMode | None) -> None:
    """Lets the blocks of a network run compiled, from their first pass on.

    To be called before the blocks are sharded or checkpointed, and after `require_compiler`.

    Args:
        mode: of torch.compile; off or None: nothing is changed.
    """
    if mode in ("off", None) or network.compiled:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KINDS)
    for block in network.blocks():
        shapes = tuple(parameter.shape for parameter in block.parameters())
        block.forward = partial(_compiled(type(block).forward, shapes, mode), block)
    network.compiled = True
    _report()


@cache
def _compiled(forward: Callable[..., Tensor], shapes: tuple[torch.Size, ...], mode: CompileMode) -> Callable[..., Any]:
    """Returns a block's forward, compiled: a copy of it, because torch stores compiled code by code object."""
    plain: Any = forward
    code = plain.__code__.replace()
    copied = FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    compiled: Callable[..., Any] = torch.compile(copied, mode=mode, dynamic=False, fullgraph=True, backend=BACKEND)
    return compiled


def begin_step(mode: CompileMode | None) -> None:
    """Lets CUDA graphs reuse the memory of the previous step.

    To be called where no result of a block is needed anymore: torch cannot tell, and would take every block that is
    called for a new step.
    """
    if mode in CUDA_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def compile_for_sampling(mode: CompileMode, model: Generator | Denoiser, *samplers: SamplerSpec) -> None:
    """Compiles the networks of samplers. Batches smaller than an earlier one are padded, and need no code."""
    others = [other for sampler in samplers for other in sampler.companions]
    for network in (each.flow.network for each in (model, *others)):
        if mode != "off" and not network.compiled:
            compile_blocks(network, mode)
            network.forward = _PaddedBatches(network.forward, mode)  # type: ignore[method-assign]


class _PaddedBatches:
    """A network's forward pass, padded to its largest batch so far: smaller batches are not compiled for.

    Each call is a step of its own.
    """

    def __init__(self, forward: Callable[..., Any], mode: CompileMode) -> None:
        self.forward = forward
        self.mode = mode
        self.largest = 0

    def __call__(self, x: Tensor, condition: Conditioning) -> Tensor:
        begin_step(self.mode)
        rows = len(x)
        self.largest = max(self.largest, rows)
        if rows < self.largest:

            def padded(tensor: Any) -> Any:
                if not isinstance(tensor, Tensor) or len(tensor) != rows:
                    return tensor
                return torch.cat([tensor, tensor[-1:].expand(self.largest - rows, *tensor.shape[1:])])

            x, condition = padded(x), Conditioning(*map(padded, condition))
        F = self.forward(x, condition)
        assert isinstance(F, Tensor)
        return F[:rows]


class _Report:
    """Says on stderr that blocks are being compiled, and every half minute how many pieces are done."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = self.began = self.reported = 0.0

    def start(self, _: object = None) -> None:
        self.began = time.monotonic()
        if not self.count:
            self.reported = self.began
            write("Compiling blocks of networks: minutes at first, seconds once torch has them in its cache.")

    def end(self, _: object = None) -> None:
        now = time.monotonic()
        self.count += 1
        self.seconds += now - self.began
        if now - self.reported >= INTERVAL:
            self.reported = now
            write(f"Compiling: {counted(self.count, 'piece')} so far, in {self.seconds:.0f} s.")


@cache
def _report() -> None:
    """Starts the reports, on the main process."""
    if process_rank()[0] == 0:
        report, handler = _Report(), torch._dynamo.callback.callback_handler
        handler.register_start_callback(report.start)
        handler.register_end_callback(report.end)
