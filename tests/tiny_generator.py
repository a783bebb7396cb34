"""A generator of 8x8 gray images that nobody trained, for tests of what is around the network."""

from pathlib import Path
from typing import Any

import torch

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, SamplingDefaults, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, Preconditioning


def tiny_generator(
    folder: Path,
    stage: Any = "generator",
    scale: float = 1.0,
    label_dim: int = 10,
    channels: int = 1,
    preconditioning: Preconditioning | None = None,
    **facts_: Any,
) -> Path:
    """Saves it, with its weights times `scale`: 1e30 makes every sample overflow."""
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "logvar_channels": 4}
    network = UNet(8, channels, label_dim, **small)
    torch.nn.init.constant_(network.out_gain, scale)
    flow = FlowNetwork(network, preconditioning or EDM(sigma_data=0.5))
    config = CheckpointConfig(
        stage=stage,
        provenance=Provenance(source="a test"),
        sampling=SamplingDefaults({"1": (80.0,)}),
        **describe(flow),
        **facts_,
    )
    save_checkpoint(folder, flow, config)
    return folder
