"""Processes that find everything imported: forks of a server, which takes the seconds that importing torch takes once.

For tests of what a process does, and not of how it starts. A fork is a whole process otherwise: it has its own
environment and working directory, hears signals, and ends as Python ends.
"""

import importlib
import json
import os
import pickle
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import shared_probes


class Forked:
    """A process of `python *words`, by its words: a script or `-m`, and what follows.

    Attributes:
        pid: of the process.
    """

    def __init__(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        folder = Path(tempfile.mkdtemp(dir=server().folder.name))
        probes, self.output = folder / "probes", folder / "said"
        probes.write_bytes(pickle.dumps(shared_probes.of_the_package()))
        wish = {"words": [*map(str, words)], "cwd": os.getcwd(), "said": str(self.output)}
        wish["environment"] = os.environ | {shared_probes.FILE: str(probes)} | (environment or {})
        self.pid = ask(wish)
        self.status: int | None = None

    def poll(self) -> int | None:
        """Returns how the process ended, its exit code or minus a signal; None as long as it has not."""
        if self.status is None:
            self.status = ask({"pid": self.pid})
        return self.status

    def finish(self) -> tuple[int | None, str]:
        """Waits for the process.  Returns: how it ended, and what it printed."""
        while self.poll() is None:
            time.sleep(0.02)
        return self.status, self.said()

    def said(self) -> str:
        """Returns what the process has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server(NamedTuple):
    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]


@cache
def server() -> Server:
    """Of this process and its tests."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    return Server(process, tempfile.TemporaryDirectory(prefix="forks-"))


NUMBERS = count()


def ask(wish: dict[str, Any]) -> Any:
    """Returns the server's answer. That to a call which a test's time limit interrupted is passed over."""
    pipes, number = server().process, next(NUMBERS)
    assert pipes.stdin is not None
    assert pipes.stdout is not None
    print(json.dumps(wish | {"number": number}), file=pipes.stdin)
    for line in pipes.stdout:
        answered, answer = json.loads(line)
        if answered == number:
            return answer
    raise EOFError("the server of forks has ended")


def stop() -> None:
    """Ends the server, if there is one."""
    if server.cache_info().currsize:
        server().process.communicate()
        server().folder.cleanup()
        server.cache_clear()


def import_everything() -> None:
    """Imports what commands import, late imports of torch's included."""
    import edmdistill

    for module in pkgutil.walk_packages(edmdistill.__path__, "edmdistill."):
        elsewhere = module.name.startswith(("edmdistill.assets", "edmdistill.export.remote", "edmdistill.__main__"))
        if not elsewhere and not module.name.endswith("_triton"):
            importlib.import_module(module.name)
    import torch
    from sklearn.datasets import load_digits

    load_digits()
    torch.optim.Adam([torch.nn.Parameter(torch.empty(3, device="meta") * 2)])


def become(wish: dict[str, Any]) -> None:
    """Makes this process the one that was asked for, and runs it."""
    said = os.open(wish["said"], os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(wish["cwd"])
    os.environ.clear()
    os.environ.update(wish["environment"])
    first, *rest = wish["words"]
    sys.argv = rest if first == "-m" else [first, *rest]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def serve() -> None:
    """Forks, and says how forks ended, a line of stdin each."""
    import_everything()
    alive: set[int] = set()
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        wish = json.loads(line)
        if "pid" in wish:
            pid = wish["pid"]
            ended, status = os.waitpid(pid, os.WNOHANG) if pid in alive else (0, 0)
            if ended:
                alive.remove(pid)
                statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(pid)
        else:
            answer = os.fork()
            if not answer:
                return become(wish)
            alive.add(answer)
        print(json.dumps([wish["number"], answer]), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
