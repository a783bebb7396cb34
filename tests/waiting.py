"""Waits with pytest's time limit and none of their own, so that no test depends on how fast the machine is."""

import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 3600
"""Seconds that a thread waits at most: longer than any test may last, and not for ever, as no process ends before its
threads do."""


def wait_until(condition: Callable[[], object]) -> None:
    """Returns once the condition is true."""
    while not condition():
        time.sleep(0.01)


def dead(pid: int) -> bool:
    """Returns whether the process has ended, waited for or not.  Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
