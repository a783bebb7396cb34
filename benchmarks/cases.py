"""The networks and runs that the benchmarks measure: random weights, the digits' data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.machine.engine import Machine
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.magnitude import GAIN_LAYERS
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.library import find_recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run

SMALL = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "EDM2": ("edm2", SMALL | {"channels_per_head": 32}),
    "DDPM++": ("song", SMALL | {"dropout": 0.0}),
    "ADM": ("adm", SMALL | {"model_channels": 64, "dropout": 0.0}),
}
"""A small network of each kind, for images of 8x8 pixels."""

MORE: dict[str, dict[str, Any]] = {
    **{method: {"method.allow_edm_time": True} for method in ("fmd", "mean-flow", "scd", "sct")},
    "cosim": {"method.warmup_images": 0},
    "ctm": {"method.max_steps": 2},
}
"""Changes to the shipped recipes: teachers read ln(sigma), CoSIM has its losses, CTM's solver two steps."""


def random_flow(kind: str, resolution: int, channels: int, classes: int, arguments: dict[str, Any]) -> FlowNetwork:
    """Returns a network of random weights, every part of which has an effect."""
    torch.manual_seed(0)
    network = new_network(kind, resolution, channels, classes, **arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.rpartition(".")[2] in GAIN_LAYERS:
                parameter.fill_(0.5)
            elif parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.02)
    return FlowNetwork(network, EDM())


def save_teacher(flow: FlowNetwork, folder: Path, **more: Any) -> Path:
    """Writes a teacher's checkpoint.  Returns: folder"""
    provenance = Provenance(source="random weights")
    save_checkpoint(folder, flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow), **more))
    return folder


def digits_run(method: str, teacher: Path, rounds: int, sets: dict[str, Any], machine: Machine | None = None) -> Run:
    """Returns a run of the shipped recipe for digits, of so many rounds.

    sets: changes by name, as of --set; training.batch is one.
    """
    long = {"training.log_every": 10**9, "training.snapshot_every": 10**9}
    known = long | {"training.images": sets["training.batch"] * rounds} | sets
    known |= MORE.get(method, {})
    changes = [f"{name}={json.dumps(value)}" for name, value in known.items()]
    recipe = find_recipe(f"{method}/digits").resolve(method, changes)
    start = None if recipe.network else teacher
    return prepare(recipe, data="digits", teacher=start, machine=machine or Machine(device="cpu"))
