"""Reads a pickle without running it.

A pickle is a program for a stack machine. `Unpickler` is such a machine for the instructions that PyTorch and the
official EDM and EDM2 code write, and for no others; the functions it may call are stand-ins of ours, looked up by their
exact (module, name). Python's own unpickler can be restricted in what it calls but not in what it allocates (a memo
index of 2^31, a hash of a deep tuple that overflows the C stack), so a file could still take the memory or the process.
Here every instruction costs some 200 bytes at most, one budget limits their number over a file and all that is nested
in it, and large values are views of the file.
"""

from __future__ import annotations

import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edmdistill.errors import INTACT

MAX_STEPS = 2**19
"""Steps in reading a file: pickle instructions, also of nested pickles, and entries that are visited. An official file
has up to about 600 tensors and takes about 200 steps for each."""
SLACK = 2**20
"""Bytes that reading any file may take, however small it is."""

FORGED = f"it is damaged or forged; {INTACT}"

# What an invalid program raises.
_MALFORMED = (IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error)


class Unreadable(Exception):
    """The reason why a file cannot be read: the part of a sentence that follows the file's name."""


class Budget:
    """The steps and bytes that reading a file, with everything nested in it, may still take.

    Args:
        size: bytes of the file. A file that shares nothing is read at most twice: as it is, and as nested pickles.
    """

    def __init__(self, size: int) -> None:
        self.steps, self.limit = MAX_STEPS, 2 * size + SLACK
        self.bytes = self.limit

    def step(self, count: int = 1) -> None:
        """Raises: Unreadable: fewer steps are left."""
        self.steps -= count
        if self.steps < 0:
            raise Unreadable(f"takes more than {MAX_STEPS:,} steps to read, which no official file does: {INTACT}")

    def take(self, size: int) -> None:
        """Raises: Unreadable: fewer bytes are left."""
        self.bytes -= size
        if self.bytes < 0:
            raise Unreadable(f"unfolds to more than {self.limit:,} bytes by using the same bytes many times: {FORGED}")


@dataclass(frozen=True)
class StandIn:
    """A function of ours that a pickle calls in place of the one that it names."""

    function: Callable[..., object]


class Stateful(ABC):
    """A stand-in for an object that a pickle creates first and gives its state later."""

    @abstractmethod
    def set_state(self, state: object) -> None: ...


class Unpickler:
    """Runs the pickles in a file, one after another.

    Args:
        data: the bytes.  Blobs in the result are views of it.
        names: the stand-in for each (module, name); all others are refused.
        resolve: returns the object of a persistent id.
        budget: of the file that holds the bytes; default: they are the whole file.
        keys: the types that keys of a dict may have: str, int.
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
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

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
                f"asks for {f'{module}.{name}'[:80]!r}, which no official file does (nothing was executed): {hint}"
            )
        return self.names[module, name]

    def run(self) -> object:
        """Returns the value of the next pickle.

        Raises: Unreadable: it is damaged, or asks for something that is refused.
        """
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while True:
                self.budget.step()
                opcode = bytes(self.take(1))
                if opcode == pickle.STOP:
                    return self.stack.pop()
                if opcode in _VALUES:
                    self.stack.append(_VALUES[opcode](self))
                else:
                    _ACTIONS[opcode](self)
        except _MALFORMED as error:
            raise Unreadable(
                f"is damaged, or no official pickle (byte {self.position:,}): download it again, or give another file"
            ) from error

    # Instructions.

    def pop(self, count: int) -> list[object]:
        """Returns the newest `count` values, the oldest of them first."""
        if count > len(self.stack):
            raise IndexError
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> list[object]:
        return self.pop(len(self.stack) - self.marks.pop())

    def call(self) -> object:
        callee, arguments = self.pop(2)
        if not isinstance(callee, StandIn) or not isinstance(arguments, tuple):
            raise TypeError
        return callee.function(*arguments)

    def persistent(self) -> object:
        if self.resolve is None:
            raise TypeError
        return self.resolve(self.stack.pop())

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stateful):
            self.stack[-1].set_state(state)
        elif not isinstance(self.stack[-1], dict):  # a dict may carry attributes, which nothing here reads
            raise TypeError

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(items)

    # Keys and members are hashed and compared in C: deep tuples would overflow its stack, large integers could collide.

    def update(self, items: list[object]) -> None:
        target, keys = self.stack[-1], items[::2]
        if not isinstance(target, dict) or not all(type(key) in self.keys for key in keys):
            raise TypeError
        if any(type(key) is int and not 0 <= key < 2**31 for key in keys):
            raise ValueError
        target.update(zip(keys, items[1::2], strict=True))

    def add(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set) or not all(isinstance(item, str) for item in items):
            raise TypeError
        target.update(items)


def _string(length: int) -> Callable[[Unpickler], object]:
    """Returns the instruction for a string whose length takes `length` bytes."""
    return lambda m: str(m.take(m.unsigned(length)), "utf-8")


def _blob(length: int) -> Callable[[Unpickler], object]:
    return lambda m: m.take(m.unsigned(length))


def _integer(data: memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


_VALUES: dict[bytes, Callable[[Unpickler], object]] = {
    pickle.NONE: lambda m: None,
    pickle.NEWTRUE: lambda m: True,
    pickle.NEWFALSE: lambda m: False,
    pickle.BININT1: lambda m: m.unsigned(1),
    pickle.BININT2: lambda m: m.unsigned(2),
    pickle.BININT: lambda m: _integer(m.take(4)),
    pickle.LONG1: lambda m: _integer(m.take(m.unsigned(1))),
    pickle.BINFLOAT: lambda m: struct.unpack(">d", m.take(8))[0],
    pickle.SHORT_BINUNICODE: _string(1),
    pickle.BINUNICODE: _string(4),
    pickle.BINUNICODE8: _string(8),
    pickle.SHORT_BINBYTES: _blob(1),
    pickle.BINBYTES: _blob(4),
    pickle.BINBYTES8: _blob(8),
    pickle.BYTEARRAY8: _blob(8),
    pickle.BINSTRING: _blob(4),
    pickle.SHORT_BINSTRING: lambda m: str(m.take(m.unsigned(1)), "latin-1"),  # Python 2's, as numpy reads them
    pickle.EMPTY_TUPLE: lambda m: (),
    pickle.TUPLE1: lambda m: tuple(m.pop(1)),
    pickle.TUPLE2: lambda m: tuple(m.pop(2)),
    pickle.TUPLE3: lambda m: tuple(m.pop(3)),
    pickle.TUPLE: lambda m: tuple(m.pop_to_mark()),
    pickle.EMPTY_LIST: lambda m: [],
    pickle.EMPTY_DICT: lambda m: {},
    pickle.EMPTY_SET: lambda m: set(),
    pickle.BINGET: lambda m: m.memo[m.unsigned(1)],
    pickle.LONG_BINGET: lambda m: m.memo[m.unsigned(4)],
    pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.find(*m.pop(2)),
    pickle.REDUCE: Unpickler.call,
    pickle.NEWOBJ: Unpickler.call,
    pickle.BINPERSID: Unpickler.persistent,
}
"""The instructions that put a value on the stack."""
_ACTIONS: dict[bytes, Callable[[Unpickler], object]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
    pickle.BINPUT: lambda m: m.remember(m.unsigned(1)),
    pickle.LONG_BINPUT: lambda m: m.remember(m.unsigned(4)),
    pickle.POP: lambda m: m.pop(1),  # of an object that refers to itself, whose second copy is dropped
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.APPEND: lambda m: m.extend(m.pop(1)),
    pickle.APPENDS: lambda m: m.extend(m.pop_to_mark()),
    pickle.SETITEM: lambda m: m.update(m.pop(2)),
    pickle.SETITEMS: lambda m: m.update(m.pop_to_mark()),
    pickle.ADDITEMS: lambda m: m.add(m.pop_to_mark()),
    pickle.BUILD: Unpickler.build,
}
"""The instructions that change the stack, or a value on it."""


def empty_dict() -> dict[str, object]:
    """Stand-in for dict and its like, which would accept pairs with any keys."""
    return {}
