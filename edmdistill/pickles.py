"""Reads a pickle without running it.

A pickle is a program for a stack machine. This is such a machine for the instructions that PyTorch and the official
EDM and EDM2 code write, and for no others; the functions it may call are stand-ins of ours, looked up by their exact
(module, name). Python's own unpickler can be restricted in what it calls but not in what it allocates (a memo index
of 2^31, a hash of a deep tuple that overflows the C stack), so a file could still take the memory or the process.
Here every instruction costs some 200 bytes at most, one budget limits their number over a file and all that is nested
in it, and large values are views of the file.
"""

from __future__ import annotations

import math
import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 2**19
"""Steps in reading a file: pickle instructions, nested pickles included, and entries that are looked at. An official
file has up to some 600 tensors and takes about 200 for each."""
SLACK = 2**20
"""Bytes that any file may take, however small."""

# Bytes of the length that goes before a string or a blob.
_LENGTHS = {
    pickle.SHORT_BINUNICODE: 1,
    pickle.BINUNICODE: 4,
    pickle.BINUNICODE8: 8,
    pickle.SHORT_BINBYTES: 1,
    pickle.BINBYTES: 4,
    pickle.BINBYTES8: 8,
}
_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
# What a nonsensical program stumbles over.
_MALFORMED = (IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error)


class Unreadable(Exception):
    """Why a file cannot be read: the part of a sentence that follows the file's name."""


class Budget:
    """What reading a file may still cost, with everything that is nested in it.

    Args:
        size: bytes of the file. A file that shares nothing is read twice at most: as it is, and as nested pickles.
    """

    def __init__(self, size: int) -> None:
        self.steps, self.limit = MAX_STEPS, 2 * size + SLACK
        self.bytes = self.limit

    def step(self, count: int = 1) -> None:
        """Raises: Unreadable: that many steps are not left."""
        self.steps -= count
        if self.steps < 0:
            raise Unreadable(f"takes more than {MAX_STEPS:,} steps to read, which no official file does")

    def take(self, size: int) -> None:
        """Raises: Unreadable: that many bytes are not left."""
        self.bytes -= size
        if self.bytes < 0:
            raise Unreadable(
                f"unfolds to more than {self.limit:,} bytes by using the same bytes many times: it is damaged or forged"
            )


@dataclass(frozen=True)
class StandIn:
    """A function that a pickle may call."""

    function: Callable[..., object]


class Stateful(ABC):
    """What a pickle may create first and give its state later."""

    @abstractmethod
    def set_state(self, state: object) -> None: ...


class Unpickler:
    """Runs the pickles in a file, one after another.

    Args:
        data: the bytes.  Blobs in the result are views of it.
        names: what each (module, name) stands for; all others are refused.
        resolve: makes an object of a persistent id.
        budget: of the file that the bytes are a part of; default: they are all of it.
        keys: the types that keys of a dict may have, of str and int.
    """

    def __init__(
        self,
        data: memoryview,
        names: Mapping[tuple[str, str], object],
        resolve: Callable[[object], object] | None = None,
        budget: Budget | None = None,
        keys: tuple[type, ...] = (str,),
    ):
        self.data, self.names, self.resolve, self.keys = data, names, resolve, keys
        self.budget = budget or Budget(len(data))
        self.position = 0

    def take(self, count: int) -> memoryview:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise Unreadable(f"ends too early, at byte {len(self.data):,}: download it again")
        return self.data[start : self.position]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        text = bytes(self.data[self.position : self.position + 256])
        return str(self.take(text.index(b"\n") + 1)[:-1], "ascii")

    def find(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if (module, name) not in self.names:
            hint = "get it from a source you trust"
            if module.split(".")[0] in ("dnnlib", "torch_utils", "training"):
                hint = "do not install dnnlib or torch_utils from PyPI, which are not NVIDIA's and are not needed"
            raise Unreadable(
                f"asks for {f'{module}.{name}'[:80]!r}, which no file of an EDM network does "
                f"(nothing was executed): {hint}"
            )
        return self.names[module, name]

    def run(self) -> object:
        """The value of the next pickle.

        Raises: Unreadable.
        """
        try:
            return self._run()
        except _MALFORMED as error:
            raise Unreadable(
                f"is damaged or not a network pickle (byte {self.position:,}): download it again"
            ) from error

    def _run(self) -> object:
        stack: list[object] = []
        marks: list[int] = []
        memo: dict[int, object] = {}

        def pop_to_mark() -> list[object]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        while True:
            self.budget.step()
            match opcode := bytes(self.take(1)):
                case pickle.MEMOIZE:
                    memo[len(memo)] = stack[-1]
                case pickle.BINPUT:
                    memo[self.unsigned(1)] = stack[-1]
                case pickle.LONG_BINPUT:
                    memo[self.unsigned(4)] = stack[-1]
                case pickle.BINGET:
                    stack.append(memo[self.unsigned(1)])
                case pickle.LONG_BINGET:
                    stack.append(memo[self.unsigned(4)])
                case pickle.MARK:
                    marks.append(len(stack))
                case pickle.NONE | pickle.NEWTRUE | pickle.NEWFALSE:
                    stack.append(_CONSTANTS[opcode])
                case pickle.BININT1:
                    stack.append(self.unsigned(1))
                case pickle.BININT2:
                    stack.append(self.unsigned(2))
                case pickle.BININT:
                    stack.append(int.from_bytes(self.take(4), "little", signed=True))
                case pickle.LONG1:
                    stack.append(int.from_bytes(self.take(self.unsigned(1)), "little", signed=True))
                case pickle.BINFLOAT:
                    stack.extend(struct.unpack(">d", self.take(8)))
                case pickle.SHORT_BINUNICODE | pickle.BINUNICODE | pickle.BINUNICODE8:
                    stack.append(str(self.take(self.unsigned(_LENGTHS[opcode])), "utf-8"))
                case pickle.SHORT_BINBYTES | pickle.BINBYTES | pickle.BINBYTES8:
                    stack.append(self.take(self.unsigned(_LENGTHS[opcode])))
                case pickle.EMPTY_TUPLE | pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                    items = [stack.pop() for _ in range(_TUPLES[opcode])]
                    stack.append(tuple(reversed(items)))
                case pickle.TUPLE:
                    stack.append(tuple(pop_to_mark()))
                case pickle.EMPTY_LIST:
                    stack.append([])
                case pickle.APPEND:
                    _extend(stack[-2], [stack.pop()])
                case pickle.APPENDS:
                    items = pop_to_mark()
                    _extend(stack[-1], items)
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    self._update(stack[-1], [key, value])
                case pickle.SETITEMS:
                    items = pop_to_mark()
                    self._update(stack[-1], items)
                case pickle.EMPTY_SET:
                    stack.append(set())
                case pickle.ADDITEMS:
                    items = pop_to_mark()
                    _add(stack[-1], items)
                case pickle.GLOBAL:
                    stack.append(self.find(self.line(), self.line()))
                case pickle.STACK_GLOBAL:
                    name, module = stack.pop(), stack.pop()
                    stack.append(self.find(module, name))
                case pickle.REDUCE | pickle.NEWOBJ:
                    arguments, callee = stack.pop(), stack.pop()
                    if not isinstance(callee, StandIn) or not isinstance(arguments, tuple):
                        raise TypeError
                    stack.append(callee.function(*arguments))
                case pickle.BUILD:
                    state = stack.pop()
                    if isinstance(stack[-1], Stateful):
                        stack[-1].set_state(state)
                    elif not isinstance(stack[-1], dict):  # a dict may carry attributes, which nothing here reads
                        raise TypeError
                case pickle.BINPERSID:
                    if self.resolve is None:
                        raise TypeError
                    stack.append(self.resolve(stack.pop()))
                case pickle.PROTO:
                    self.take(1)
                case pickle.FRAME:
                    self.take(8)
                case pickle.STOP:
                    return stack.pop()
                case _:
                    raise ValueError

    # Keys and members are hashed and compared in C: deep tuples would overflow its stack, large integers could collide.

    def _update(self, target: object, items: list[object]) -> None:
        keys = items[::2]
        if not isinstance(target, dict) or not all(type(key) in self.keys for key in keys):
            raise TypeError
        if any(type(key) is int and not 0 <= key < 2**31 for key in keys):
            raise ValueError
        target.update(zip(keys, items[1::2], strict=True))


def _extend(target: object, items: list[object]) -> None:
    if not isinstance(target, list):
        raise TypeError
    target.extend(items)


def _add(target: object, items: list[object]) -> None:
    if not isinstance(target, set) or not all(isinstance(item, str) for item in items):
        raise TypeError
    target.update(items)


def empty_dict() -> dict[str, object]:
    """Stands for dict and its kin, which would take pairs with any keys."""
    return {}


class Dtype(Stateful):
    """Stands for numpy.dtype, of numbers only."""

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
    """Stands for numpy.ndarray; the numbers are a view of the file."""

    numbers: npt.NDArray[np.generic] = np.zeros(0)

    def set_state(self, state: object) -> None:
        match state:
            case (1, tuple() as shape, Dtype() as dtype, False, memoryview() as data):
                self.numbers = np.frombuffer(data, dtype.code).reshape(shape)
            case _:
                raise TypeError


def read_scalar(dtype: object, data: object) -> object:
    """Stands for numpy.core.multiarray.scalar."""
    if not isinstance(dtype, Dtype) or not isinstance(data, memoryview):
        raise TypeError
    return np.frombuffer(data, dtype.code).item()


@dataclass(frozen=True)
class StorageType:
    """Stands for torch.FloatStorage and the like."""

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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch.save began before torch 1.6


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or several tensors, still in the file."""

    dtype: str
    numel: int
    data: memoryview


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor's shape and place; the numbers are read when asked for, and torch is imported no sooner."""

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
        return _SIZES[self.dtype]

    def tensor(self) -> Tensor:
        """A copy of the tensor's own numbers, contiguous: what else is in the storage takes no memory."""
        import torch

        size = self.itemsize  # NumPy has no bfloat16: the copy is made of integers of the same size
        numbers = np.frombuffer(self.storage.data, f"<i{size}")[self.offset :]
        own = np.lib.stride_tricks.as_strided(
            numbers, self.shape, [size * step for step in self.stride], writeable=False
        )
        return torch.from_numpy(own.copy()).view(getattr(torch, self.dtype))


def read_storage(blob: object, budget: Budget | None = None) -> Storage:
    """The storage in what torch.storage._load_from_bytes is called with.

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
        raise Unreadable(
            f"declares {numel:,} {kind.dtype} numbers where it holds {len(data):,} bytes: it is damaged or forged"
        )
    return Storage(kind.dtype, numel, data)


def rebuild_tensor(storage: object, offset: int, shape: object, stride: object, *_: object) -> StoredTensor:
    """Stands for torch._utils._rebuild_tensor_v2; refuses what is empty, reaches outside its storage or repeats it."""
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
            f"{storage.numel:,} numbers: it is damaged or forged"
        )
    return tensor
