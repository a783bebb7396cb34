"""Does everything run on this GPU as on a CPU, and how fast: one script, under eight minutes on an H100.

    python benchmarks/gpu_check.py [--out gpu_check.jsonl] [--parts golden methods ...] [--device cuda|emulated|cpu]
    python benchmarks/gpu_check.py --list

Each part prints lines of JSON as it goes: "ok" says whether its results are as they should be. A part that fails, hangs
or crashes CUDA does not stop the next: parts run in a process of their own, which is replaced when it dies or takes too
long. `--device emulated` runs the parts at small sizes on a device that keeps CUDA's rules over the CPU's numbers
(tests/emulated_device.py); its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gpu_parts import correctness, performance
from gpu_parts.shared import ROOT, Line, Setting, plain_numbers


class Part(NamedTuple):
    """A part, its time limit in seconds on a GPU, and whether it runs only if --parts names it."""

    act: Callable[[Setting], Iterator[Line]]
    limit: float
    named: bool = False


PARTS = {
    "environment": Part(correctness.environment, 20),
    "random_numbers": Part(correctness.random_numbers, 15),
    "golden": Part(correctness.golden, 40),
    "methods": Part(correctness.methods, 95),
    "resume": Part(correctness.resume, 20),
    "options": Part(correctness.options, 30),
    "memory": Part(performance.memory, 60),
    "speed": Part(performance.speed, 75),
    "sampling": Part(performance.sampling, 25),
    "levers": Part(performance.levers, 60),
    "kernels": Part(performance.kernels, 40),
    "compiled": Part(performance.compiled, 600, named=True),
    "compile_modes": Part(performance.compile_modes, 900, named=True),
}
DEFAULT = [name for name, part in PARTS.items() if not part.named]
SLOWER = 10
"""Time limits elsewhere, as a multiple."""


# The process that runs parts, and the one that watches it.


def work(names: Iterable[str], device: str) -> None:
    """Runs parts in this process, and prints their lines. It ends early where CUDA is broken."""
    import torch

    sys.path.append(str(ROOT / "tests"))
    for name in names:
        plain_numbers()
        print(json.dumps({"part": name, "begins": True}), flush=True)
        start, failed = time.perf_counter(), False
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(device, device == "cuda", Path(scratch))
            try:
                with on_device(device):
                    for line in PARTS[name].act(setting):
                        failed = failed or not line.get("ok", True)
                        print(json.dumps({"part": name} | line), flush=True)
                end: Line = {"ok": not failed}
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}:{last.lineno}"
                end = {"ok": False, "error": f"{type(error).__name__}: {error}"[:1000], "at": place}
        print(json.dumps({"part": name, "ends": True, "seconds": time.perf_counter() - start} | end), flush=True)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                os._exit(1)  # nothing more can run on this context


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Makes the emulated device known while the block runs."""
    if device != "emulated":
        yield
        return
    from emulated_device import emulated

    with emulated():
        yield


def watch(names: list[str], device: str, write: Callable[[Line], object]) -> bool:
    """Runs parts in processes, each for as long as it goes well.  Returns: whether all parts are as they should be."""
    fine = True
    while names:
        command = [sys.executable, __file__, "--device", device, "--worker", "--parts", *names]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        current, error = names[0], "the process died"
        deadline = [time.monotonic() + 300]  # torch's libraries are gigabytes, which a disk may read for minutes
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            for line in lines_of(process, deadline):
                if line is None:
                    process.kill()
                    error = "it took too long"
                    break
                write(line)
                current = line["part"]
                if line.get("begins"):
                    deadline[0] = time.monotonic() + PARTS[current].limit * (1 if device == "cuda" else SLOWER)
                if line.get("ends"):
                    fine = fine and line["ok"]
                    names = names[names.index(current) + 1 :]
                    deadline[0] = time.monotonic() + 60
        if names and process.returncode and names[0] == current:  # its part did not end
            write({"part": current, "ends": True, "ok": False, "error": error})
            names, fine = names[1:], False
    return fine


def lines_of(process: subprocess.Popen[bytes], deadline: list[float]) -> Iterator[Line | None]:
    """Yields what a process prints as JSON; None once the deadline has passed, which may be moved meanwhile."""
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline[0] - time.monotonic()))
        if not ready:
            yield None
            return
        new = os.read(process.stdout.fileno(), 65536)
        if not new:
            return
        *whole, rest = (rest + new).split(b"\n")
        for line in whole:
            if line.startswith(b"{"):
                yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "emulated", "cpu"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=DEFAULT, metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--list", action="store_true", help="print the parts, and do nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:<15} {(part.act.__doc__ or '').strip().splitlines()[0]}")
    elif options.worker:
        work(options.parts, options.device)
    else:
        with options.out.open("w") as file:

            def write(line: Line) -> None:
                for target in (file, sys.stdout):
                    print(json.dumps(line), file=target, flush=True)

            sys.exit(not watch(options.parts, options.device, write))


if __name__ == "__main__":
    main()
