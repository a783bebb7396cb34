"""Trains every method in several ways, in as many processes as there are together.

spread.py TEACHER OUT.json ROUNDS ROWS[s] ...

Each way is the rows of a micro-batch, at least a group, with an s if the networks are sharded.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm
from toy_runs import NETWORK, OPTIONS, source_of

from edmdistill.machine.engine import Engine, Machine
from edmdistill.methods import METHODS
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare

CASES = {name: {"name": name} | OPTIONS.get(name, {}) for name in METHODS}
# Log variances that the loss reaches only after the first round.
CASES["fmd"] = CASES["fmd"] | {"trajectory_steps": 2, "trajectory_images": 8}
# Two passes of the generator before one backward pass, each at weights of guidance that belong to rows.
CASES["scd, vsd"] = CASES["scd"] | {"vsd": 1.0, "guidance": [1.0, 2.0]}
# Images' own gradients in the discriminator's turn, several turns of a role, and gradients of the last layer.
CASES["cosim, gan"] = CASES["cosim"] | {"gan": 1.0, "gan_loss": "relativistic", "gan_channels": 8, "auxiliary_turns": 2}
FEW = ["cosim, gan", "ctm", "fmd", "scd, vsd"]
"""Of every kind of turn, one case: of a score, of a discriminator, of a value with its tangent, of trajectories."""


def recipe(case: str, rounds: int) -> Recipe:
    betas = [0.0 if case in ("cosim", "cosim, gan", "sid") else 0.9, 0.999]
    tables = {
        "method": CASES[case],
        "training": {"images": rounds * 8, "batch": 8, "lr": 1e-3, "log_every": 8, "snapshot_every": 8, "dropout": 0.2}
        | {"betas": betas},
        "ema": {"half_life_images": 50, "sigma_rel": [0.1]},
        "sampling": {"nfe": [1]},
    }
    if case == "diffusion":
        tables["network"] = {"kind": "edm2", "arguments": NETWORK}
    return Recipe.from_json(json.dumps(tables).encode())


def losses(case: str, teacher: Path, count: int, machine: Machine) -> list[dict[str, float]]:
    """What every round measured, and the norm of each average after the last."""
    source = source_of(case.split(",")[0], teacher) or teacher  # diffusion trains it further, in its float64
    force, tables = "guidance" in CASES[case], recipe(case, count)
    if isinstance(machine.micro_batch, int):
        machine = machine._replace(micro_batch=max(machine.micro_batch, tables.group_size))
    run = prepare(tables, data="digits", teacher=source, machine=machine, force_guidance=force)
    found = list(rounds(run))
    for role in run.optimizers.keys() if not machine.shard else ():
        weights = torch.cat([parameter.detach().flatten() for parameter in run.networks[role].parameters()])
        found[-1][f"apart/{role}"] = float(
            (run.engine.all_reduce(weights) / run.engine.world_size - weights).abs().max()
        )
    for average in run.averages:
        whole = run.engine.full_state(average.network.network).values()
        found[-1][f"average/{average.profile.name}"] = float(get_total_norm(whole))
    return found


def measured(teacher: str | Path, count: str, *ways: str) -> dict[str, list[dict[str, float]]]:
    """Of every case in every way; in 2 rounds, of a few."""
    cases = [case for case in CASES if int(count) > 2 or case in FEW]
    return {
        f"{case} {way}": losses(case, Path(teacher), int(count), Machine("cpu", int(way.removesuffix("s")), "s" in way))
        for case, way in itertools.product(cases, ways)
    }


def main(teacher: str, out: str, count: str, *ways: str) -> None:
    engine = Engine(Machine(device="cpu"))
    found = measured(teacher, count, *ways)
    if engine.is_main:
        Path(out).write_text(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
