"""Scripts run by two processes together, as torchrun starts them, but without its own process."""

import signal
import socket
from pathlib import Path

from forks import Forked


def run_by_two(script: Path, *arguments: object) -> None:
    """Runs a script as both ranks of a world of two; what it prints is shown where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"ACCELERATE_MIXED_PRECISION": "bf16"}  # as accelerate's launcher sets it; the recipe's counts
    ranks = [Forked(script, *arguments, environment=world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    try:
        ends = [process.finish() for process in ranks]
        assert [status for status, _ in ends] == [0, 0], "\n".join(said for _, said in ends)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
