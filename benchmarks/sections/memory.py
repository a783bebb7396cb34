"""What `edmdistill plan` says against what a CoSIM round takes, with random weights.

On a GPU, networks as published; on a CPU, a sixth of their channels, and the peak is what the profiler sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cases import random_flow, save_teacher
from timing import Row, peak_bytes

from edmdistill.machine.engine import Machine
from edmdistill.networks.published import PUBLISHED
from edmdistill.planning.plan import make_plan
from edmdistill.planning.plan import measure as measure_plan
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from sections.training import held

BATCH = 2
CASES: tuple[tuple[str, dict[str, object]], ...] = (
    ("edm2-img512-s", {}),
    ("ddpmpp-cifar10", {}),
    ("ddpmpp-cifar10", {"checkpointing": True}),
    ("ddpmpp-cifar10", {"loss_pieces": 2}),
)
"""Networks, and options of the machine."""


def make_data(folder: Path, resolution: int, channels: int, classes: int) -> Path:
    """Writes a few latents, or images in their place, as arrays of moments.  Returns: folder"""
    generator = np.random.default_rng(0)
    folder.mkdir()
    labels = []
    for index in range(4):
        moments = np.abs(generator.standard_normal((2 * channels, resolution, resolution), dtype=np.float32))
        np.save(folder / f"{index}.npy", moments)
        labels.append([f"{index}.npy", max(0, classes - 1 - index)])
    if classes:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def measure(options: argparse.Namespace) -> Iterator[Row]:
    on_cpu = options.device == "cpu"
    training = {"images": 3 * BATCH, "batch": BATCH, "lr": 1e-5, "log_every": 10**9, "snapshot_every": 10**9}
    training |= {"precision": "bf16", "betas": [0.0, 0.99]}
    tables = {"method": {"name": "cosim"}, "training": training, "ema": {"half_life_images": 500_000}}
    recipe = Recipe.from_json(json.dumps(tables).encode())
    for index, (name, more) in enumerate(CASES):
        machine = Machine(device=options.device, micro_batch=BATCH, **more)
        kind, (resolution, channels, classes), arguments = PUBLISHED[name]
        if on_cpu:
            arguments = arguments | {"model_channels": max(32, arguments.get("model_channels", 128) // 6)}
        flow = random_flow(kind, resolution, channels, classes, arguments)
        planned = make_plan(measure_plan(recipe, flow, machine), machine).peak(BATCH, accumulates=False)
        encoder = {"kind": "StabilityVAEEncoder", "scale": [0.12] * channels, "bias": [0.0] * channels}
        teacher = save_teacher(flow, options.scratch / f"memory-{index}", encoder=encoder)
        data = make_data(options.scratch / f"data-{index}", resolution, channels, classes)
        run = prepare(recipe, data=data, teacher=teacher, machine=machine)
        steps = rounds(run)
        next(steps)
        measured = peak_bytes(lambda steps=steps: next(steps), options.device) + (held(run) if on_cpu else 0)
        says = {"plan GB": planned / 1e9, "measured GB": measured / 1e9, "plan / measured": planned / measured}
        yield {"network": name, "options": ", ".join(f"{key} {value}" for key, value in more.items()), **says}
