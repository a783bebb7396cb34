"""Scripts run by two processes together, as torchrun starts them, but without its own process."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_by_two(script: Path, *arguments: object) -> None:
    """Runs a script as both ranks of a world of two; what it prints is shown where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command, pipes = [sys.executable, script, *map(str, arguments)], {"stdout": -1, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, text=True, **pipes)
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate()[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    finally:
        for process in ranks:
            process.kill()
