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

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "emulated"
MEMORY = 80 * 10**9
"""Bytes of the device, unless a test gives another number."""

COPIES = {"copy_", "_to_copy"}
WAITS = {
    *(
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "bincount",
        "histc",
        "repeat_interleave",
    ),
    *("unique_dim", "_unique2", "unique_consecutive", "_linalg_eigh"),
}
"""Operations whose result, or its size, the host needs."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
TWO_DEVICES = INDEXED | COPIES | {"where", "_foreach_copy_"}
"""Operations that copy an operand to the device themselves."""
VIEWS = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "transpose", "permute", "slice", "select", "t"),
    *(
        "squeeze",
        "unsqueeze",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "unfold",
    ),
    *("diagonal", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}
"""Operations that launch nothing."""


class Log:
    """What a device was asked for.

    Attributes:
        waits: number of times that the host waited, by cause and line of the package.
        copied: bytes, by direction: up, down.
        kernels: number of launches, by operation.
        memory, peak: bytes that tensors hold now, and held at most.
        refuses: whether a wait raises; see torch.cuda.set_sync_debug_mode.
    """

    refuses = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.memory = self.peak = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all counts; memory stays."""
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copied: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.peak = self.memory

    def wait(self, cause: str) -> None:
        self.waits[cause, where()] += 1
        if self.refuses and cause != "synchronize":
            raise RuntimeError(f"called a synchronizing CUDA operation: {cause} at {where()}")

    def take(self, size: int) -> None:
        if self.memory + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.memory += size
        self.peak = max(self.peak, self.memory)


def where() -> str:
    """Returns the line of the package that is running, as training/loop.py:64; that of the caller if there is none."""
    frame = sys._getframe(1)
    while frame is not None and "/edmdistill/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/edmdistill/')[2]}:{frame.f_lineno}"


LOG = Log(MEMORY)
PINNED: dict[int, torch.Tensor] = {}
"""Pinned memory by its address, kept until the block ends."""
COMING: dict[int, str] = {}
"""Addresses of host memory that copies from the device write to, and the lines that asked; nobody has waited yet."""
LEAVING: dict[int, str] = {}
"""The same of copies to the device."""
HOLDERS: Counter[int] = Counter()
"""Number of the device's tensors at each address."""
REFERENCES: dict[int, weakref.ref[torch.Tensor]] = {}


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class OnDevice(torch.Tensor):
    """A tensor of the device around one of the host."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> OnDevice:
        assert not isinstance(here, OnDevice)
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=torch.device(DEVICE, 0),
            requires_grad=False,
        )
        return made

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here
        place, size = address(here), here.untyped_storage().nbytes()
        if not HOLDERS[place]:
            LOG.take(size)
        HOLDERS[place] += 1
        number = id(self)

        def release(_: object) -> None:
            del REFERENCES[number]
            HOLDERS[place] -= 1
            if not HOLDERS[place]:
                del HOLDERS[place]
                LOG.memory -= size

        REFERENCES[number] = weakref.ref(self, release)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors among the arguments of an operation, which are values or lists of values."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Returns a value or a list of values with the function's results in the place of tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, item) for item in value])
    return value


def is_emulated(device: object) -> bool:
    return device is not None and torch.device(device).type == DEVICE  # type: ignore[arg-type]


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes an operation on the device, or one between it and the host."""
    name = func.overloadpacket.__name__
    if name == "_foreach_copy_":
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        for target, source in zip(args[0], args[1], strict=True):
            target.copy_(source, non_blocking=not blocking)
        return None
    leaves = [*tensors_of(args), *tensors_of(kwargs.values())]
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    hosts = [leaf for leaf in leaves if not isinstance(leaf, OnDevice)]
    device = kwargs.get("device")
    stays = bool(ours) if device is None else is_emulated(device)
    if ours and hosts:
        check_devices(func, name, leaves, hosts)
    if name in COPIES:
        count_copy(name, args, kwargs, stays)
    elif ours:
        count_waits(name, args, hosts)
    if stays and name not in VIEWS:
        LOG.kernels[name] += 1

    args = mapped(lambda leaf: leaf.here if isinstance(leaf, OnDevice) else leaf, args)
    kwargs = {key: value.here if isinstance(value, OnDevice) else value for key, value in kwargs.items()}
    lands_pinned = name == "_to_copy" and not stays and kwargs.get("non_blocking") and str(device) != "meta"
    if name == "_to_copy":
        kwargs.pop("non_blocking", None)
    if is_emulated(device):
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if lands_pinned:
        PINNED[address(out)] = out
        COMING[address(out)] = where()
    known = {id(leaf.here): leaf for leaf in ours} | {id(leaf): leaf for leaf in hosts}  # changed in place

    def wrapped(leaf: torch.Tensor) -> torch.Tensor:
        return known[id(leaf)] if id(leaf) in known else (OnDevice(leaf) if stays else leaf)

    return mapped(wrapped, out)


def check_devices(func: Any, name: str, leaves: list[torch.Tensor], hosts: list[torch.Tensor]) -> None:
    """Raises: RuntimeError: an operation has operands of two devices, and CUDA does not allow it."""
    if name in COPIES:
        return
    binary = torch.Tag.pointwise in func.tags and len(leaves) == 2
    for tensor in hosts:
        allowed = name in INDEXED or (tensor.ndim == 0 and (binary or name in TWO_DEVICES))
        if not allowed:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} has one of the CPU, {list(tensor.shape)} "
                f"{tensor.dtype}, at {where()}"
            )


def count_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], stays: bool) -> None:
    """Counts the bytes of a copy, and whether the host waits for it."""
    source = args[1] if name == "copy_" else args[0]
    stays = isinstance(args[0], OnDevice) if name == "copy_" else stays
    if str(kwargs.get("device")) == "meta":
        return
    quiet = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    size = source.numel() * source.element_size()
    if isinstance(source, OnDevice) and not stays:
        LOG.copied["down"] += size
        if quiet and (name == "_to_copy" or address(args[0]) in PINNED):
            if name == "copy_":
                COMING[address(args[0])] = where()
        else:
            LOG.wait("copy down")
            settle()
    elif stays and not isinstance(source, OnDevice):
        LOG.copied["up"] += size
        if quiet and address(source) in PINNED:
            LEAVING[address(source)] = where()
        else:
            LOG.wait("copy up" if quiet is None or not quiet else "copy up from memory that is not pinned")


def count_waits(name: str, args: tuple[Any, ...], hosts: list[torch.Tensor]) -> None:
    if name in WAITS:
        LOG.wait(name)
        settle()
    elif name == "where" and hosts:
        LOG.wait("scalar of where")
    elif name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, OnDevice) for index in indices):
            LOG.wait("index from the host")
        if any(index.dtype == torch.bool for index in indices) and name in ("index", "_unsafe_index"):
            LOG.wait("mask as an index")
        if "put" in name and not isinstance(args[2], OnDevice):
            LOG.wait("scalar of index_put")


class Device(TorchDispatchMode):
    """Sees operations that only name the device, and those on the host's memory that copies are using."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what skips it takes longer than the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if OnDevice in types or is_emulated(kwargs.get("device")):
            return dispatch(func, args, kwargs)
        if (COMING or LEAVING) and func.overloadpacket.__name__ not in VIEWS:
            check_host(func, args, kwargs)
        if kwargs.get("pin_memory"):
            out = func(*args, **{**kwargs, "pin_memory": False})
            PINNED[address(out)] = out
            return out
        return func(*args, **kwargs)


def check_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises: RuntimeError: an operation of the host uses memory that a copy is still using."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tensors_of([given.get(argument.name)]):
            line = COMING.get(address(leaf)) or (LEAVING.get(address(leaf)) if writes else None)
            if line is not None:
                raise RuntimeError(f"{func} at {where()}: nobody has waited for the copy of {line}")


def settle() -> None:
    """Ends all copies: the host has waited."""
    COMING.clear()
    LEAVING.clear()


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
