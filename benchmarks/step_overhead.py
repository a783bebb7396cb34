"""What a round of training costs beyond its networks: CoSIM at the size of EDM2-S, random weights, ratio in one run.

    python benchmarks/step_overhead.py [--batches 1 3] [--rounds 2] [--width 192]

Networks: forward and backward passes of both turns, called bare. Engine: the same rounds as `edmdistill train` takes
them, with data, random numbers, measures, the gradient's norm, Adam, forced weight normalization and the average: most
of it goes by the parameters, not by the images. On a CPU it takes 16 GB and some minutes.
"""

import argparse
import io
import json
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.draws import Draws
from edmdistill.machine.engine import Machine
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run


def make_teacher(folder: Path, width: int) -> Path:
    """EDM2-S for 64x64 RGB images: width 192 is S."""
    torch.manual_seed(0)
    flow = FlowNetwork(UNet(64, 3, 1000, model_channels=width), EDM())
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="random weights"), **describe(flow))
    save_checkpoint(folder, flow, config)
    return folder


def make_data(file: Path, images: int = 16) -> Path:
    """Random pictures of a thousand classes."""
    rng = np.random.default_rng(0)
    labels = [[f"{i}.png", 999 if i == 0 else i] for i in range(images)]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        for name, _ in labels:
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "png")
            archive.writestr(name, buffer.getvalue())
    return file


def bare(run: Run, batches: list) -> None:
    """The networks of a round alone."""
    for index, turn in enumerate(run.method.turns()):
        run.set_trainable(turn.role)
        draws = Draws([0, 0, index], run.recipe.training.batch, device=run.engine.device)
        turn.loss(batches[index], draws).value.mean().backward()
        run.networks[turn.role].zero_grad(set_to_none=True)


def clock(run: Run) -> float:
    if run.engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(recipe: Recipe, teacher: Path, data: Path, device: str | None, rounds_: int) -> tuple[float, float, int]:
    """Seconds of the networks of a round, seconds of the whole round, and the parameters of one network."""
    run = prepare(recipe, data=data, teacher=teacher, machine=Machine(device=device))
    batch = recipe.training.batch
    batches = [run.stream().read(i * batch, (i + 1) * batch) for i in range(2)]
    steps = rounds(run)
    next(steps)  # Adam's memory is made, and the first round's checks are done
    networks, whole = [], []
    for _ in range(rounds_):
        start = clock(run)
        bare(run, batches)
        middle = clock(run)
        next(steps)
        networks.append(middle - start)
        whole.append(clock(run) - middle)
        print(f"batch {batch}: networks {networks[-1]:.2f} s, round {whole[-1]:.2f} s", flush=True)
    parameters = sum(p.numel() for p in run.networks["teacher"].parameters())
    return min(networks), min(whole), parameters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs=2, default=(1, 3), metavar="N")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--device")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher, data = make_teacher(Path(scratch) / "teacher", options.width), make_data(Path(scratch) / "data.zip")
        for batch in options.batches:
            training = {"images": batch * (options.rounds + 1), "batch": batch, "lr": 1e-5, "log_every": 10**9}
            tables = {
                "method": {"name": "cosim"},
                "training": training | {"snapshot_every": 10**9},
                "ema": {"half_life_images": 500_000},
            }
            recipe = Recipe.from_json(json.dumps(tables).encode())
            networks, whole, parameters = measured(recipe, teacher, data, options.device, options.rounds)
            size = f"{parameters / 1e6:.0f}M parameters"
            print(f"batch {batch}, {size}: a round takes {whole / networks:.3f} of its networks")


if __name__ == "__main__":
    main()
