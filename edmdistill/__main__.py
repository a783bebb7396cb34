"""`python -m edmdistill` is the command `edmdistill`."""

import sys


def main() -> None:
    """Runs the command line. Its import is part of it: Ctrl-C ends both alike."""
    try:
        from edmdistill.cli import main as command

        command(prog_name="edmdistill")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
