"""Training on the emulated device, beside the same on the CPU, in a process of its own.

rounds.py '[["compare", teacher, recipe, machine, rounds], ["settle", teacher, recipe, machine, capacity], ...]' prints
what these functions return; the machine is a table of Machine's.
"""

import gc
import json
import sys
from typing import Any

import torch
from emulated_device import DEVICE, emulated
from shared_probes import share_probes

from edmdistill.machine.engine import Engine, Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.micro_batch import settle_micro_batch
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run


def start(teacher: str | None, recipe: dict[str, Any], device: str, machine: dict[str, Any]) -> Run:
    made = Recipe.from_json(json.dumps(recipe).encode())
    machine = {name: tuple(value) if isinstance(value, list) else value for name, value in machine.items()}
    return prepare(made, data="digits", teacher=teacher, machine=Machine(device=device, **machine))


def weights(run: Run) -> torch.Tensor:
    """Of all that is trained or follows, in the host's memory."""
    return torch.cat([tensor.flatten().double() for group in run.state().values() for tensor in group.values()])


def compare(teacher: str | None, recipe: dict[str, Any], machine: dict[str, Any], number: int) -> dict[str, Any]:
    """Trains so many rounds on both devices, and one more on the emulated one, which is measured.

    Returns: waits of that round, by cause and line; its kernels and bytes; turns of a round; and the relative distance
        of all trained numbers after the other rounds from those on the CPU.
    """
    alike = {name: machine[name] for name in ("micro_batch", "second_moment") if name in machine}
    host = start(teacher, recipe, "cpu", alike)
    steps = rounds(host)
    for _ in range(number):
        next(steps)
    expected = weights(host)
    with emulated() as log:
        run = start(teacher, recipe, DEVICE, machine)
        steps = rounds(run)
        for _ in range(number):
            next(steps)
        found = weights(run)
        log.clear()
        next(steps)
        waits = {f"{cause} {line}": count for (cause, line), count in log.waits.items()}
        kernels, copied, peak = sum(log.kernels.values()), dict(log.copied), log.peak
        assert Engine(Machine(device="cpu")).device.type == "cpu"  # beside a run on the device
        del run, steps
        gc.collect()  # what refers to itself holds memory of the next case
    distance = float((found - expected).norm() / expected.norm())
    turns = len(host.method.turns())
    return {"waits": waits, "kernels": kernels, "copied": copied, "peak": peak, "distance": distance, "turns": turns}


def settle(teacher: str, recipe: dict[str, Any], machine: dict[str, Any], capacity: int) -> dict[str, Any]:
    """Lets a device of so many bytes find its micro-batch, and trains a round by it."""
    with emulated(capacity) as log:
        run = start(teacher, recipe, DEVICE, machine)
        settle_micro_batch(run)
        next(rounds(run))
        return {"size": run.engine.machine.micro_batch, "peak": log.peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_probes()
    cases = json.loads(sys.argv[1])
    print(json.dumps([{"compare": compare, "settle": settle}[name](*case) for name, *case in cases]))
