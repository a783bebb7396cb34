"""Ctrl-C, SIGTERM, a closed terminal and a scheduler's notice as a request to stop, instead of an exception in the
middle of a step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICES: tuple[int, ...] = signal.SIGUSR1, signal.SIGUSR2
"""What schedulers send some time before they end a job, perhaps repeatedly; SIGTERM may follow."""
REQUESTS: tuple[int, ...] = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *NOTICES
ECHO = 0.5
"""Seconds within which a second signal is an echo of the first: `timeout` and some services signal a process and its
launcher, or its group."""


@contextmanager
def stop_on_signal(on_message: Callable[[str], object]) -> Iterator[threading.Event]:
    """Yields an event that the first of REQUESTS sets. A second one has its usual effect, unless it or the first is one
    of NOTICES; one that is ignored stays so.

    Args:
        on_message: gets the sentence for the user.
    """
    stop = threading.Event()
    first: float | None = None
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if number in NOTICES:
            if not stop.is_set():
                stop.set()
                on_message("Stopping after this round.")
        elif first is None:
            first = now
            stop.set()
            on_message("Stopping after this round; once more stops at once.")
        elif now - first > ECHO:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    heard = [number for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's, a script's `&`
    usual = {number: signal.signal(number, ask) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
