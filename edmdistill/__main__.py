"""`python -m edmdistill` is the command `edmdistill`."""

import signal
import sys
from types import FrameType

AGAIN = 0.02
"""Seconds until Ctrl-C is looked at again that came during an import."""


def main() -> None:
    """Runs the command line. Its import is part of it: Ctrl-C ends both alike."""
    try:
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # and not of nohup
            signal.signal(signal.SIGALRM, interrupt)
            signal.signal(signal.SIGINT, interrupt)

        from edmdistill.cli import main as command

        command(prog_name="edmdistill")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; after an import that is in progress: torch and numpy make other errors of one there."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
