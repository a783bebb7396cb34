"""The types of options: each checks what was typed once, before any work begins."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from edmdistill.atomic import exists, is_pipe, unwritable
from edmdistill.errors import EdmDistillError, comma_separated, did_you_mean

MAX_NFE, MAX_BATCH = 10_000, 65_536
MAX_GUIDANCE = 1000.0
PROTOCOLS = "digits", "tiles", "pixels", "edm", "edm2", "adm", "cosim"
FEATURES = "inception", "dinov2", "inception-pytorch-fid", "dinov2-dgm", "digits", "tiles", "pixels"
SOLVERS = "heun", "ddim", "dpm-solver-2s", "dpm-solver++2m", "ipndm", "unipc"
COMPILE = "off", "default", "reduce-overhead", "max-autotune"
SECOND_MOMENTS = "fp32", "bf16"
"""The keys of the library's tables, which are not imported for `--help`; a test compares them."""
EMPTY = "the path is empty; name a file or folder."


class Count(click.IntRange):
    """A whole number in a range, also as in 5e4."""

    name = "whole number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d*)?(e\+?\d\d?)?\s*", value, re.IGNORECASE):
            number = Decimal(value)  # exact, as seeds are
            value = int(number) if number == number.to_integral_value() else value
        return int(super().convert(value, param, ctx))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N"


class FiniteFloat(click.FloatRange):
    """A number in a range; click.FloatRange lets nan and infinity pass.

    Args:
        infinite: infinity is allowed, nan is not.
    """

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        min_open: bool = False,
        max_open: bool = False,
        *,
        infinite: bool = False,
    ) -> None:
        super().__init__(min, max, min_open, max_open)
        self.name, self.infinite = "number", infinite

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "X"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]  # click's stub asks for a float
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Memory(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """The word auto, or an amount of memory, in bytes."""

    name = "memory"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "auto|48GB"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        amount = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?(GB|GiB|MB|MiB)", str(value))
        if value != "auto" and (amount is None or float(amount[1]) == 0):
            self.fail(f"{value!r} is not an amount of memory: write auto, or as in 48GB or 44.5GiB.", param, ctx)
        units = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
        return "auto" if amount is None else float(amount[1]) * units[amount[2]]


class Name(click.Choice[str]):
    """One of some names; another one is answered by the nearest."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Choose one of {', '.join(self.choices)}."

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"{str(value)!r} is not known; {did_you_mean(str(value), self.choices)}"


class CommaList(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """A list with commas between its entries.

    Args:
        item: the type of an entry.
    """

    name = "list"

    def __init__(self, item: click.ParamType[Any] = click.STRING) -> None:
        self.item = item

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default
            return value
        try:
            entries = comma_separated(value)
        except EdmDistillError as error:
            self.fail(f"{error}.", param, ctx)
        return self.of(entries, param, ctx)

    def of(self, entries: list[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the values of entries."""
        return [self.item.convert(entry, param, ctx) for entry in entries]


class NumberList(CommaList):
    """Numbers with commas between them, as in 1,2,4; each is checked by `item`.

    Args:
        item: the type of one number, such as Count or FiniteFloat.
        example: shown where the text is no list.
    """

    def __init__(self, item: click.ParamType[Any], example: str) -> None:
        super().__init__(item)
        self.example = example

    def of(self, entries: list[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            for entry in entries:
                float(entry)
        except ValueError:
            self.fail(f"{','.join(entries)!r} is not a list of numbers such as {self.example}.", param, ctx)
        return super().of(entries, param, ctx)


class NameList(CommaList):
    """Some of a set of names, with commas between them, each once, as a tuple."""

    def __init__(self, choices: Sequence[str]) -> None:
        super().__init__(Name(choices))
        self.choices = choices

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return ",".join(self.choices)

    def of(self, entries: list[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return tuple(dict.fromkeys(super().of(entries, param, ctx)))


class NamedFile(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """A file or folder for one of a set of names, as in inception=FILE; the command gets (name, path)."""

    name = "file"

    def __init__(self, choices: Sequence[str]) -> None:
        self.item = Name(choices)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, equals, path = str(value).partition("=")
        if not (equals and path):
            self.fail(f"{value!r} does not have the form NAME=FILE.", param, ctx)
        return self.item.convert(name, param, ctx), Path(path)


class InputPath(click.Path):
    """A file or folder to read; "" is refused, of which Path would make the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        if not text:
            self.fail(EMPTY, param, ctx)
        return Path(text)


class OutputPath(click.Path):
    """A file or folder to write. Refuses what can never be written, before any work begins.

    That is "", a name too long, the root folder, a device or pipe, a place where nothing may be written, and a
    suffix other than those known.

    Args:
        suffixes: of the file, in lower case; none = any. Case is ignored.
        moved: it is made aside and moved to its place, which neither ., .. nor a place of a mounted disk can be.
        filled: it is a folder that is written in where there is one, as a container's volume beside read-only folders.
    """

    NAME_BYTES, PATH_BYTES = 255, 4096

    def __init__(self, *suffixes: str, moved: bool = False, filled: bool = False) -> None:
        super().__init__(path_type=Path)
        self.suffixes, self.moved, self.filled = suffixes, moved, filled

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        if not text.strip():
            self.fail(EMPTY, param, ctx)
        try:
            path = Path(text).expanduser()
            whole = path.absolute()
        except RuntimeError:
            self.fail(f"{text} names a user who does not exist on this machine; write the path in full.", param, ctx)
        if whole == Path(whole.anchor):
            self.fail(f"{text} is the root folder; name a folder inside it.", param, ctx)
        if self.moved and (path.name in ("", "..") or os.path.ismount(path)):
            self.fail(f"{text} cannot be replaced; name a folder in it, as in {Path(text, 'NAME')}.", param, ctx)
        if max(len(os.fsencode(part)) for part in whole.parts) > self.NAME_BYTES or len(bytes(whole)) > self.PATH_BYTES:
            self.fail(f"the name is longer than the {self.NAME_BYTES} bytes a file name may have.", param, ctx)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{text} must end in {' or '.join(self.suffixes)}: no other format is written here.", param, ctx)
        try:
            if exists(whole) and is_pipe(whole):
                self.fail(f"{text} is a device or a pipe; name a file or folder.", param, ctx)
            if self.suffixes and whole.is_dir():
                self.fail(f"{text} is a folder, and a file is to be written; choose another name.", param, ctx)
            refusing = unwritable(whole / "file" if self.filled and whole.is_dir() else whole)
        except OSError as error:
            self.fail(f"{text} cannot be reached ({error.strerror}); choose another place.", param, ctx)
        if refusing is not None:
            self.fail(f"{text} cannot be written, for {refusing} is not a folder you may write to.", param, ctx)
        return path


NFE = Count(1, MAX_NFE)
GAMMA = FiniteFloat(0, 1)
BATCH = Count(1, MAX_BATCH)
