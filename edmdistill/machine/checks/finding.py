"""Findings of the doctor's checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

GIB = 2**30


class Finding(NamedTuple):
    """One line of the doctor's report.

    Attributes:
        check: what was checked.
        level: ok, warn or fail.
        detail: what was found.
        fix: what to do about it, unless it is ok.
    """

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]
"""Yields a finding for each thing that it checks."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]
