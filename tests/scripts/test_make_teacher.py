"""The shipped teacher's layout is the official one: our reader takes it, and the function survives float16."""

from __future__ import annotations

from pathlib import Path

import torch
from make_teacher import to_pickle

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM


def test_a_network_written_in_the_official_layout_reads_back_as_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet(
        8, 1, 10, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], logvar_channels=4
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)  # a half, so that float16 holds gain / sqrt(fan_in) to its last digit or two
    flow = FlowNetwork(network, EDM(sigma_data=0.4))
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="a test"), **describe(flow))

    path = tmp_path / "teacher.pkl"
    path.write_bytes(to_pickle(network, config))
    official = read_official(path)
    found, _ = build_official(official)

    assert (official.preconditioning_class, official.network_class) == ("Precond", "UNet")
    assert {info.dtype for info in official.tensors.values()} == {torch.float16}
    assert found.sigma_data == 0.4
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 2.0, 80.0]), torch.arange(4)
    expected, result = Denoiser(flow)(x, sigma, labels), Denoiser(found)(x, sigma, labels)
    assert (expected - result).abs().max() < 5e-3 * expected.abs().max()
