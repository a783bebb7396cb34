"""A tiny teacher, recipes that take milliseconds a round, and runs of theirs that several tests look at."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from forks import Forked
from msgspec.structs import replace
from shared_probes import share_probes

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run
from edmdistill.training.session import train

NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
TABLES = {
    "training": {"images": 24, "batch": 8, "lr": 1e-2, "log_every": 16, "snapshot_every": 80, "dropout": 0.1},
    "ema": {"half_life_images": 50},
    "sampling": {"nfe": [1]},
}
OPTIONS = {
    **{name: {"allow_edm_time": True} for name in ("fmd", "mean-flow", "scd", "sct")},
    "dmd2": {"auxiliary_turns": 2},
    "sida": {"gan_warmup_images": 8},
    "imm": {"particles": 2},
    "ladd": {"levels": [2.5], "r1": 1.0},
    "kd": {"levels": [2.5], "trajectory_steps": 3},
    "pd": {"steps": 2},
    "ctm": {"N": 4, "max_steps": 2, "gan_channels": 8},  # the teacher's steps are most of its time
}
"""Of a method, beside its name."""

ALIKE = {"cd", "dscd", "ect", "kd", "imm", "mean-flow", "pd", "sct", "sida", "tcm"}
"""Methods whose networks and turns are like another's: scd's, fmd's, dmd2's."""

ALL_METHODS = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(METHODS)]

share_probes()


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
    save_sources(folder, flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow)))
    return folder


def save_sources(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> None:
    """Saves a teacher, and beside it the same network as the first stage of a method that goes on from one."""
    save_checkpoint(folder, flow, config)
    save_checkpoint(folder.with_name("first-stage"), flow, replace(config, stage="generator", method="ect"))


def source_of(method: str, teacher: Path | str) -> Path | None:
    """Returns what a run of the method starts from."""
    if method == "diffusion":
        return None
    stages = METHODS[method].load().first_stages
    return Path(teacher).with_name("first-stage") if stages and "diffusion" not in stages else Path(teacher)


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    """recipe(method, ema, **training): a tiny recipe with another [ema], and other values in its [training]."""

    def make(method: str, ema: dict[str, object] | None = None, **training: object) -> Recipe:
        own = {"name": method} | OPTIONS.get(method, {})
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
        source = source_of(method, teacher)
        return prepare(recipe(method, **training), data="digits", teacher=source, machine=machine)

    return make


@pytest.fixture(scope="session")
def whole(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Run, Path]]:
    """whole(method, **training): a run that nothing disturbs, at its end, and its directory; once for all tests."""

    @cache
    def make(method: str, **training: object) -> tuple[Run, Path]:
        run, run_dir = start(method, **training), tmp_path_factory.mktemp("whole") / "run"
        assert train(run, run_dir, on_message=lambda sentence: None).finished
        return run, run_dir

    return make


@pytest.fixture(scope="session")
def live(teacher: Path) -> Callable[..., list[str]]:
    """live(recipe, run_dir, *ends): how lives in that directory ended; see lives.py."""

    def lives(recipe: Recipe, run_dir: Path, *ends: int | str) -> list[str]:
        source = source_of(recipe.method_name, teacher)
        words = recipe.to_json().decode(), source and str(source), str(run_dir), ends
        status, said = Forked(Path(__file__).parent / "training" / "lives.py", json.dumps(words)).finish()
        assert status == 0, said
        ended: list[str] = json.loads(said.splitlines()[-1])
        return ended

    return lives
