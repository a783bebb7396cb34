"""NumPy's and PyTorch's numbers in a pickle: stand-ins for their classes, which leave the numbers in the file.

A tensor is copied, and torch imported, only when it is asked for.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edmdistill.atomic import require_no_pipe
from edmdistill.pickles import FORGED, Budget, StandIn, Stateful, Unpickler, Unreadable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dtype(Stateful):
    """Stand-in for numpy.dtype, for numbers only."""

    def __init__(self, code: str, *_: object):
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"):
            raise TypeError
        self.code = code

    def set_state(self, state: object) -> None:
        match state:
            case (int(), "<" | "|", *_):
                return
        raise TypeError


class Array(Stateful):
    """Stand-in for numpy.ndarray; the numbers are a view of the file."""

    numbers: npt.NDArray[np.generic] = np.zeros(0)

    def set_state(self, state: object) -> None:
        match state:
            case (1, tuple() as shape, Dtype() as dtype, bool() as fortran, memoryview() as data):
                self.numbers = np.frombuffer(data, dtype.code).reshape(shape, order="F" if fortran else "C")
            case _:
                raise TypeError


def read_scalar(dtype: object, data: object) -> object:
    """Stand-in for numpy.core.multiarray.scalar."""
    if not isinstance(dtype, Dtype) or not isinstance(data, memoryview):
        raise TypeError
    return np.frombuffer(data, dtype.code).item()


def read_buffer(data: object, dtype: object, shape: object, order: object) -> Array:
    """Stand-in for numpy.core.numeric._frombuffer, by which protocol 5 writes an array."""
    if not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise TypeError
    array = Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


NUMPY: dict[tuple[str, str], object] = {
    (f"numpy.{core}.{module}", name): StandIn(function)
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", lambda *_: Array()),
        ("multiarray", "scalar", read_scalar),
        ("numeric", "_frombuffer", read_buffer),
    )
} | {("numpy", "ndarray"): None, ("numpy", "dtype"): StandIn(Dtype)}
"""The stand-ins for NumPy's names; ndarray is only ever an argument of _reconstruct."""


@dataclass(frozen=True)
class StorageType:
    """Stand-in for torch.FloatStorage and the like."""

    dtype: str
    itemsize: int


STORAGE_TYPES = {
    ("torch", f"{name}Storage"): StorageType(dtype, itemsize)
    for name, dtype, itemsize in (
        ("Float", "float32", 4),
        ("Half", "float16", 2),
        ("BFloat16", "bfloat16", 2),
        ("Double", "float64", 8),
        ("Long", "int64", 8),
        ("Int", "int32", 4),
        ("Short", "int16", 2),
        ("Char", "int8", 1),
        ("Byte", "uint8", 1),
        ("Bool", "bool", 1),
    )
}
_SIZES = {kind.dtype: kind.itemsize for kind in STORAGE_TYPES.values()}
LARGE = 2**20
"""Size in bytes from which tensors get pages of their own, and pages of a file are released."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch.save before torch 1.6


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or more tensors, still in the file."""

    dtype: str
    numel: int
    data: memoryview

    @property
    def itemsize(self) -> int:
        return _SIZES[self.dtype]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor's shape and its place in a storage; `tensor` reads the numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def itemsize(self) -> int:
        return self.storage.itemsize

    def tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a contiguous copy of the tensor: the rest of the storage takes no memory.

        dtype: of the copy; default: as it is stored.
        """
        import torch

        size = self.itemsize  # NumPy has no bfloat16: the copy is made of integers of the same size
        numbers = np.frombuffer(self.storage.data, f"<i{size}")[self.offset :]
        view = np.lib.stride_tricks.as_strided(
            numbers, self.shape, [size * step for step in self.stride], writeable=False
        )
        stored = getattr(torch, self.dtype)
        copy = empty_pages(self.shape, dtype or stored)
        if copy.dtype == stored:
            copy.view(getattr(torch, f"int{8 * size}")).numpy()[...] = view
        else:
            copy.copy_(torch.from_numpy(view.copy()).view(stored))
        release(self.storage.data)
        return copy


def empty_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor whose memory, unlike malloc's, goes back to the system once it is freed."""
    import torch

    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def mapped(path: Path) -> memoryview:
    """Returns the bytes of a file, mapped: one of several GB is not in memory a second time beside its tensors.

    Raises: Unreadable: it is empty.  CheckpointError: it is a pipe.  OSError: it cannot be read.
    """
    require_no_pipe(path)
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Unreadable("is empty: download it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def release(data: memoryview) -> None:
    """Releases the pages of a mapped file that were read; the system's cache may still have them."""
    if isinstance(data.obj, mmap.mmap) and hasattr(data.obj, "madvise") and len(data) >= LARGE:
        data.obj.madvise(mmap.MADV_DONTNEED)


def read_storage(blob: object, budget: Budget | None = None) -> Storage:
    """Returns the storage in the argument of torch.storage._load_from_bytes.

    Such a blob is a file of torch.save before torch 1.6: five pickles (a magic number, the format's version, facts
    about the machine, the storage as a persistent id, the list of storages), the count of numbers, the numbers.
    """
    if not isinstance(blob, memoryview):
        raise TypeError
    budget = budget or Budget(len(blob))
    budget.take(len(blob))
    declared: list[tuple[StorageType, int]] = []

    def resolve(identifier: object) -> None:
        match identifier:
            case ("storage", StorageType() as kind, str(), str(), int() as numel, None):
                declared.append((kind, numel))
            case _:
                raise TypeError

    machine = Unpickler(blob, STORAGE_TYPES, resolve, budget)
    magic, version, system = machine.run(), machine.run(), machine.run()
    if magic != LEGACY_MAGIC or version != 1001:
        raise Unreadable("holds a tensor in an unknown format: get the file from NVIDIA again")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unreadable("was written on a big-endian machine, which is not supported: get the file from NVIDIA")
    machine.run()
    machine.run()
    ((kind, numel),) = declared
    header, data = machine.unsigned(8), blob[machine.position :]
    if header != numel or len(data) != numel * kind.itemsize:
        raise Unreadable(f"declares {numel:,} {kind.dtype} numbers where it holds {len(data):,} bytes: {FORGED}")
    return Storage(kind.dtype, numel, data)


def rebuild_tensor(storage: object, offset: int, shape: object, stride: object, *_: object) -> StoredTensor:
    """Stand-in for torch._utils._rebuild_tensor_v2.

    Raises: Unreadable: the tensor is empty, reaches outside its storage or repeats it.
    """
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise TypeError
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > 8 or not all(type(n) is int and abs(n) < 2**63 for n in numbers):
        raise TypeError
    tensor = StoredTensor(storage, offset, shape, stride)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min(numbers) < 0 or not 0 < tensor.numel <= storage.numel or last >= storage.numel:
        raise Unreadable(
            f"holds a tensor of shape {shape}, stride {stride} and offset {offset} in a storage of "
            f"{storage.numel:,} numbers: {FORGED}"
        )
    return tensor
