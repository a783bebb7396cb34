"""A generator of one time: its jumps and its levels. Those of two times are tried in sampling/test_gamma_jumps."""

import pytest
import torch

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, SamplingDefaults, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.schedules import generator_sigmas
from edmdistill.trigflow import denoised, diffuse, implied_noise, sigma_to_time


def make() -> Generator:
    torch.manual_seed(0)
    network = UNet(4, 2, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    torch.nn.init.constant_(network.out_gain, 0.5)
    flow = FlowNetwork(network, EDM()).eval().requires_grad_(False)
    levels = SamplingDefaults({"2": (80.0, 1.5)})
    return Generator(
        flow,
        CheckpointConfig(stage="generator", sampling=levels, provenance=Provenance(source="a test"), **describe(flow)),
    )


def test_it_draws_what_its_network_denoises() -> None:
    generator = make()
    x_t, t, labels = torch.randn(2, 2, 4, 4), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    x0 = generator(x_t, t, labels)
    assert torch.equal(x0, denoised(x_t, generator.flow(x_t, t, labels), t, 0.5))
    s = t / 2  # on the way, its data and the noise that they imply
    torch.testing.assert_close(generator.jump(x_t, t, s, labels), diffuse(x0, implied_noise(x_t, x0, t), s))


def test_it_does_not_jump_back() -> None:
    generator, x_t = make(), torch.randn(2, 2, 4, 4)
    assert torch.equal(generator.jump(x_t, 0.5, 0.5), x_t)
    for s in (0.6, [0.4, 0.6], torch.tensor([0.6, 0.5])):
        with pytest.raises(EdmDistillError, match=r"s = 0\.6 is after t = 0\.5"):
            generator.jump(x_t, 0.5, s)


def test_its_levels_are_its_own_or_edms_curve() -> None:
    generator = make()
    assert torch.equal(generator.schedule(2), sigma_to_time(torch.tensor([80.0, 1.5], dtype=torch.float64), 0.5))
    assert torch.equal(generator.schedule(3), sigma_to_time(generator_sigmas(3, 0.002, 80.0), 0.5))
