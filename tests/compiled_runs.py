"""Trains compiled and not compiled, in as many processes as there are together.

compiled_runs.py TEACHER OUT.json WAY ...

A way is a case of spread.py and fields of Machine, as JSON: ["cosim", {"shard": true}].
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from edmdistill.machine import compile
from edmdistill.machine.engine import Engine, Machine

ROUNDS = 5
losses = runpy.run_path(str(Path(__file__).parent / "machine" / "spread.py"))["losses"]


def both(teacher: Path, case: str, options: dict[str, Any]) -> list[list[dict[str, float]]]:
    """Returns what the rounds measured without torch.compile, and with it."""
    machine = Machine(device="cpu", **options)
    return [losses(case, teacher, ROUNDS, machine._replace(compile=mode)) for mode in ("off", "default")]


def main(teacher: str, out: str, *ways: str) -> None:
    engine = Engine(Machine(device="cpu"))
    measures = {way: both(Path(teacher), *json.loads(way)) for way in ways}
    if engine.is_main:
        Path(out).write_text(json.dumps(measures))
    engine.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    compile.BACKEND = "aot_eager"  # graphs as for inductor, and no C++
    main(*sys.argv[1:])
