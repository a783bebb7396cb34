"""`python -m edmdistill` is the command `edmdistill`."""

import signal
import sys
from types import FrameType

AGAIN = 0.02
"""Seconds until another look at a Ctrl-C that came during an import."""


def main() -> None:
    """Runs the command line; Ctrl-C ends it alike while it is still being imported."""
    try:
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in a script's background
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
    """Raises KeyboardInterrupt once no import is in progress: within one, torch and numpy make another error of it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
