"""The types and sentences that commands share: each checks what a user typed once, before any work begins."""

from __future__ import annotations

import math
from pathlib import Path

import click

from edmdistill.errors import did_you_mean


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
        self.infinite = infinite

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]  # click's stub asks for a float
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Name(click.Choice[str]):
    """One of some names; another one is answered by the nearest."""

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"{str(value)!r} is not known; {did_you_mean(str(value), self.choices)}"


class OutputPath(click.Path):
    """A file or folder to write. Refuses what can never be written: "", a NUL, a name too long, the root folder."""

    NAME_BYTES, PATH_BYTES = 255, 4096

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        if not text.strip():
            self.fail("the path is empty; name a file or folder.", param, ctx)
        if "\0" in text:
            self.fail("the path holds a NUL character; leave it out.", param, ctx)
        try:
            path = Path(text).expanduser()
            whole = path.absolute()
        except RuntimeError:
            self.fail(f"{text} names a user who does not exist on this machine; write the path in full.", param, ctx)
        except FileNotFoundError:
            self.fail("the working directory no longer exists; change to another one.", param, ctx)
        if whole == Path(whole.anchor):
            self.fail(f"{text} is the root folder; name a folder inside it.", param, ctx)
        if max(len(part.encode()) for part in whole.parts) > self.NAME_BYTES or len(bytes(whole)) > self.PATH_BYTES:
            self.fail(f"the name is longer than the {self.NAME_BYTES} bytes a file name may have.", param, ctx)
        return path


def say(sentence: str) -> None:
    """Prints a line for the user on stderr, above a progress bar if there is one; nothing under `--quiet`."""
    from edmdistill.progress import write

    write(sentence)
