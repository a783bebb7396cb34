"""Generators that exports tell apart, and a VAE."""

from pathlib import Path

import pytest
import torch
from two_times import with_second_time

from edmdistill.checkpoints.config import (
    CheckpointConfig,
    Guidance,
    Provenance,
    SamplingDefaults,
    describe,
)
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.rebuild import rebuild

LATENT = "edm2-latent-cond.pkl"


@pytest.fixture(scope="session")
def runs(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of pixels that reads a weight of guidance, one that reads a second time, and one of latents."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 8}
    pixels = FlowNetwork(new_network("edm2", 8, 1, 3, guided=True, **small), EDM())
    for gain in pixels.parameters():
        if gain.ndim == 0:
            torch.nn.init.constant_(gain, 0.5)
    torch.nn.init.normal_(pixels.network.map_guidance.weight)
    jumps = with_second_time(rebuild(pixels, {}, guided=False))
    for name, flow in {"pixels": pixels, "jumps": jumps, "latents": load_flow(golden / LATENT)[0]}.items():
        names = tuple(f"class {i}, number {i}, digit" for i in range(flow.label_dim))
        config = CheckpointConfig(
            stage="generator",
            sampling=SamplingDefaults({"2": (80.0, 3.0)}, gamma=0.7),
            label_names=names,
            guidance=Guidance("classes", (1.0, 3.0)) if flow.guided else None,
            encoder=load_flow(golden / LATENT)[1].encoder if name == "latents" else {"kind": "pixels"},
            provenance=Provenance(source="a test"),
            **describe(flow),
        )
        save_checkpoint(root / name / "generator", flow, config)
    return root


@pytest.fixture(scope="session")
def vae(golden: Path) -> str:
    return str(golden / "evaluation/latents/tiny-vae")
