"""Trains with a second moment in bfloat16, sharded over the processes that there are together.

rounded_shards.py TEACHER OUT.json writes how far the generator's weights are from those of a run in float32, relative
to the way that these have come, and whether a run that resumes from the state after two of three rounds has its bits.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from edmdistill.machine.engine import Engine, Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run

TABLES = {
    "method": {"name": "cosim"},
    "training": {"images": 24, "batch": 8, "lr": 1e-3, "log_every": 8, "snapshot_every": 8, "betas": [0.0, 0.99]},
    "ema": {"half_life_images": 50},
}
State = dict[str, dict[str, Tensor]]


def start(teacher: str, machine: Machine) -> Run:
    return prepare(Recipe.from_json(json.dumps(TABLES).encode()), data="digits", teacher=teacher, machine=machine)


def states(run: Run) -> list[State]:
    """Returns the run's states, before training and after every round; they are empty but on the main process."""
    return [copied(run.state()), *(copied(run.state()) for _ in rounds(run))]


def copied(state: State) -> State:
    return {name: {key: value.clone() for key, value in group.items()} for name, group in state.items()}


def weights(state: State) -> Tensor:
    return torch.cat([value.flatten() for name, value in state["generator"].items() if name.startswith("weights.")])


def main(teacher: str, out: str) -> None:
    engine, machine = Engine(Machine(device="cpu")), Machine(device="cpu", shard=True)
    plain, rounded = (states(start(teacher, machine._replace(second_moment=kind))) for kind in ("fp32", "bf16"))
    if engine.is_main:
        torch.save(rounded[2], Path(out).with_name("state.pt"))
    engine.broadcast(0)  # the others wait for it
    again = start(teacher, machine._replace(second_moment="bf16"))
    again.restore(torch.load(Path(out).with_name("state.pt")), 16)
    resumed = states(again)[-1]
    if engine.is_main:
        begun, one, other = weights(plain[0]), weights(plain[3]), weights(rounded[3])
        differ = [
            key for name, group in rounded[3].items() for key in group if not group[key].equal(resumed[name][key])
        ]
        dtypes = {str(value.dtype) for value in second_moments(rounded[3]).values()}
        distance = float((other - one).norm() / (one - begun).norm())
        Path(out).write_text(json.dumps({"distance": distance, "differ": differ, "dtypes": sorted(dtypes)}))
    engine.close()


def second_moments(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state["generator"].items() if name.startswith("exp_avg_sq.")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
