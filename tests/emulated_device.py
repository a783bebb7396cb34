"""A GPU without a GPU: tensors that hold their numbers in the host's memory, and keep CUDA's rules.

In a process that has called `install`, `emulated()` gives torch a device of its own, named DEVICE, by way of Python
(PrivateUse1), for as long as the block runs. Its numbers are the CPU's; what differs on CUDA is enforced or counted:

- an operation on tensors of two devices raises, except where CUDA allows it: 0-dim CPU tensors in binary operations;
- what lets the host wait for the device is counted, with the line of the package that asks for it: items, blocking
  copies, copies from memory that is not pinned, scalars that `where` and `index_put_` copy, indices from the host;
- a copy that is not waited for must be left alone until someone waits: what has come down must not be read, and what
  goes up must not be overwritten;
- memory has an end, beyond which torch.OutOfMemoryError is raised; its peak is measured.

Registration lasts as long as the process: tests run in forks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from emulated_rules import (
    COMING,
    DEVICE,
    LOG,
    MEMORY,
    PINNED,
    Device,
    Log,
    OnDevice,
    address,
    is_emulated,
    settle,
    where,
)
from torch.utils import backend_registration


def synchronize(device: object = None) -> None:
    LOG.wait("synchronize")
    settle()


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, **options: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def elapsed_time(self, other: object) -> float:
        return 0.0

    def synchronize(self) -> None:
        synchronize()


@cache
def install() -> None:
    """Registers the device with torch, until the process ends."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, module)


def through_host(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns torch.tensor or torch.as_tensor, which make a tensor of the host and copy it."""

    def make(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if isinstance(data, OnDevice):
            return data.to(device=device or data.device, dtype=options.get("dtype"))
        made = real(data, *args, device="cpu" if is_emulated(device) else device, **options)
        return made.to(device) if is_emulated(device) else made

    return make


def pin(self: torch.Tensor, device: object = None) -> torch.Tensor:
    if isinstance(self, OnDevice):
        raise RuntimeError("cannot pin a tensor of the device: only dense CPU tensors can be pinned")
    copy = self.clone()
    PINNED[address(copy)] = copy
    return copy


def methods() -> dict[str, Callable[..., Any]]:
    """Returns methods of tensors that torch answers before the device is asked."""
    real_tolist, real_new = torch.Tensor.tolist, torch.Tensor.new_tensor

    def tolist(self: torch.Tensor) -> Any:
        if isinstance(self, OnDevice):
            LOG.wait("tolist")
            settle()
            return self.here.tolist()
        if address(self) in COMING:
            raise RuntimeError(f"tolist at {where()}: nobody has waited for the copy of {COMING[address(self)]}")
        return real_tolist(self)

    def new_tensor(self: torch.Tensor, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
        if isinstance(self, OnDevice):
            return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)
        return real_new(self, data, dtype=dtype, device=device, **options)

    def is_pinned(self: torch.Tensor, device: object = None) -> bool:
        return not isinstance(self, OnDevice) and address(self) in PINNED

    return {"tolist": tolist, "new_tensor": new_tensor, "pin_memory": pin, "is_pinned": is_pinned}


def cuda_functions(capacity: int) -> dict[str, Callable[..., Any]]:
    """Returns what the package may ask of torch.cuda."""

    def reset_peak(device: object = None) -> None:
        LOG.peak = LOG.memory

    def set_sync_debug_mode(mode: str) -> None:
        LOG.refuses = mode == "error"

    return {
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": synchronize,
        "Event": Event,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "memory_allocated": lambda device=None: LOG.memory,
        "max_memory_allocated": lambda device=None: LOG.peak,
        "reset_peak_memory_stats": reset_peak,
        "get_device_properties": lambda device=None: SimpleNamespace(name="emulated", total_memory=capacity),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
    }


@contextmanager
def emulated(capacity: int = MEMORY) -> Iterator[Log]:
    """Yields what the device was asked for, while the package finds one GPU; see `install`.

    Tensors of the device must not be used after the block.

    Args:
        capacity: bytes of the device.
    """
    from accelerate import PartialState

    from edmdistill.machine import devices

    install()
    PartialState._reset_state()  # it remembers the first device of a process
    real_empty_like = torch.empty_like

    def empty_like(x: torch.Tensor, *args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = real_empty_like(x, *args, **options)
        if pin_memory:
            PINNED[address(made)] = made
        return made

    LOG.capacity = capacity
    LOG.clear()
    with ExitStack() as stack:
        for owner, names in ((torch.Tensor, methods()), (torch.cuda, cuda_functions(capacity))):
            for name, function in names.items():
                stack.enter_context(patch.object(owner, name, function))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, through_host(getattr(torch, name))))
        stack.enter_context(patch.object(torch, "empty_like", empty_like))
        stack.enter_context(patch.object(devices, "named_device", lambda name: torch.device(name or "cpu")))
        stack.enter_context(patch.object(PartialState, "default_device", torch.device(DEVICE)))
        stack.callback(PartialState._reset_state)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.callback(settle)
        stack.callback(PINNED.clear)
        # In this thread: torch's own for a device ends the process when Python runs in it for checkpointing.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Device())
        yield LOG
