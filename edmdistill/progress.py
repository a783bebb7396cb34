"""Progress on stderr: a bar where stderr is a terminal, a line now and then where it is a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Timer
from typing import Any

from tqdm import tqdm

from edmdistill.errors import printable, printable_lines

INTERVAL = 30.0
"""Seconds between the lines where stderr is no terminal."""
DELAY = 3.0
"""Seconds of work before anything is shown."""

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Shows no progress and no sentences from now on, if `quiet`; errors are still printed."""
    global _quiet
    _quiet = quiet


def progress_bar(total: float | None = None, desc: str | None = None, unit: str = "image", **options: Any) -> tqdm[Any]:
    """Returns a tqdm bar, a context manager with `update`, that suits stderr and `--quiet`.

    Args:
        total, desc, unit, options: tqdm's own.
    """
    bar = _style()
    return bar(total=total, desc=desc and printable(desc), unit=unit, **({"delay": DELAY, "disable": _quiet} | options))


@contextmanager
def stage_bar(desc: str) -> Iterator[Callable[[str], object]]:
    """Yields a function that is called with the name of every stage of some work, and shows those that take a while."""
    with progress_bar(desc=desc, unit="step", bar_format="{desc} [{elapsed}]") as bar, ExitStack() as stack:
        waiting: Timer | None = None

        def refresh() -> None:
            bar.last_print_t = time.time()  # by which `close` knows that there is a line to end
            bar.refresh()

        def show(stage: str) -> None:
            nonlocal waiting
            if waiting is not None:
                waiting.cancel()
            bar.set_description_str(printable(f"{desc}: {stage}"), refresh=False)
            bar.n += 1
            if not bar.disable:
                waiting = Timer(DELAY, refresh)  # nothing else comes while the stage lasts
                waiting.daemon = True
                waiting.start()
                stack.callback(waiting.cancel)

        yield show


def bar_class() -> type[tqdm[Any]]:
    """Returns a class of such bars, for a library that makes its own."""
    base: Any = _style()

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            disable = _quiet or options.pop("disable", None)
            if desc := options.get("desc"):
                options["desc"] = printable(desc)
            super().__init__(*args, **({"delay": DELAY} | options | {"disable": disable}))

    return Bar


def _style() -> Any:
    """Returns a class of bars, or of lines where tqdm draws none: on terminals without a width, as `script` has."""
    try:
        return tqdm if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns else _Lines
    except OSError:  # a terminal that does not say
        return tqdm


def write(sentence: str) -> None:
    """Prints a line, or several, on stderr, above the bars that are shown; nothing under `--quiet`."""
    if not _quiet:
        tqdm.write(printable_lines(sentence), file=sys.stderr)


class _Lines(tqdm):  # type: ignore[misc]
    """A bar written as whole lines, without carriage returns: logs stay readable."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._shown = -1
        super().__init__(*args, **({"mininterval": INTERVAL, "miniters": 1, "maxinterval": 0} | options))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n > self._shown:
            self._shown = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: a line that is written stays."""

    def close(self) -> None:
        if not getattr(self, "disable", True):
            self.disable = True
            if time.time() - self.start_t >= self.delay and self.n:
                self.display()
            self._decr_instances(self)
