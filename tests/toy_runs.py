"""A tiny teacher, and recipes that take milliseconds a round."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edmdistill.checkpoints.store import CheckpointConfig, Provenance, facts, save_checkpoint
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes import Recipe
from edmdistill.training.engine import Machine
from edmdistill.training.run import Run, prepare

NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
TABLES = {
    "training": {"images": 24, "batch": 8, "lr": 1e-2, "log_every": 16, "snapshot_every": 80, "dropout": 0.1},
    "ema": {"half_life_images": 50},
    "sampling": {"nfe": [1]},
}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights whose every part has an effect."""
    torch.manual_seed(0)
    network = UNet(8, 1, 10, logvar_channels=8, **NETWORK)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    flow = FlowNetwork(network, EDM())
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    provenance = Provenance(source="a test", licence="cc-by-nc-sa-4.0")
    save_checkpoint(folder, flow, CheckpointConfig(stage="teacher", provenance=provenance, **facts(flow)))
    return folder


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    """recipe(method, ema, **training): a tiny recipe with another [ema], and other values in its [training]."""

    def make(method: str, ema: dict[str, object] | None = None, **training: object) -> Recipe:
        own = {"name": method} | ({"allow_edm_time": True} if method in ("scd", "sct") else {})
        tables = TABLES | {"method": own, "training": TABLES["training"] | training}
        tables |= {"ema": ema or TABLES["ema"]}
        if method == "diffusion":
            tables |= {"network": {"kind": "edm2", "arguments": NETWORK}}
        return Recipe.from_json(json.dumps(tables).encode())

    return make


@pytest.fixture(scope="session")
def start(recipe: Callable[..., Recipe], teacher: Path) -> Callable[..., Run]:
    """start(method, machine, **training): a run on the digits, before its first step."""

    def make(method: str, machine: Machine = Machine(device="cpu"), **training: object) -> Run:
        source = None if method == "diffusion" else teacher
        return prepare(recipe(method, **training), data="digits", teacher=source, machine=machine)

    return make
