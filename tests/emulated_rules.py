"""CUDA's rules on tensors in the host's memory: what the device of emulated_device.py computes, refuses and counts."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
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
