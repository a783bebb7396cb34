"""A generator of one time: its jumps and its levels. Those of two times are tried in sampling/test_gamma_jumps."""

import pytest
import torch

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, SamplingDefaults, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.schedules import generator_sigmas
from edmdistill.trigflow import denoised, diffuse, implied_noise, sigma_to_time


def make(guidance: Guidance | None = None) -> Generator:
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    network = UNet(4, 2, 3, guided=guidance is not None, **small)
    for gain in network.parameters():
        if gain.ndim == 0:
            torch.nn.init.constant_(gain, 0.5)
    if guidance:
        torch.nn.init.normal_(network.map_guidance.weight)
    flow = FlowNetwork(network, EDM()).eval().requires_grad_(False)
    levels, origin = SamplingDefaults({"2": (80.0, 1.5)}), Provenance(source="a test")
    config = CheckpointConfig(
        stage="generator", sampling=levels, guidance=guidance, provenance=origin, **describe(flow)
    )
    return Generator(flow, config)


def test_it_draws_what_its_network_denoises() -> None:
    generator = make()
    x_t, t, labels = torch.randn(2, 2, 4, 4), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    x0 = generator(x_t, t, labels)
    assert torch.equal(x0, denoised(x_t, generator.flow(x_t, t, labels), t, 0.5))
    s = t / 2  # on the way, its data and the noise that they imply
    torch.testing.assert_close(generator.jump(x_t, t, s, labels), diffuse(x0, implied_noise(x_t, x0, t), s))


def test_classes_and_weights_are_for_all_or_for_each() -> None:
    """Without a weight, it is guided by the smallest that it takes."""
    generator = make(Guidance("classes", (1.5, 3.0)))
    x_t = torch.randn(1, 2, 4, 4).expand(2, -1, -1, -1)
    both = generator(x_t, 1.2, [0, 2], w=[1.5, 3.0])
    for row, label, w in ((0, 0, 1.5), (1, 2, 3.0)):
        torch.testing.assert_close(generator(x_t, 1.2, label, w=w)[row], both[row])
        for other in (
            generator(x_t, 1.2, label, w=4.5 - w),
            generator(x_t, 1.2, None, w=w),
            generator(x_t, 1.2, 1, w=w),
        ):
            assert (other[row] - both[row]).abs().max() > 1e-3
    assert generator.guidance == (1.5, 3.0)
    assert torch.equal(generator(x_t, 1.2, 1), generator(x_t, 1.2, 1, w=1.5))
    assert make().guidance == (1.0, 1.0)


def test_it_has_the_sizes_and_levels_of_a_denoiser() -> None:
    generator, denoiser = make(), Denoiser(make().flow)
    for name in ("sigma_data", "sigma_min", "sigma_max", "img_resolution", "img_channels", "label_dim"):
        assert getattr(generator, name) == getattr(denoiser, name)


def test_what_it_cannot_take_is_refused() -> None:
    generator, x_t = make(), torch.randn(2, 2, 4, 4)
    for call, why in (
        (lambda: generator(x_t, 1.2, w=2.0), "trained for no range of guidance weights"),
        (lambda: generator(torch.randn(2, 3, 4, 4), 1.2), r"\[2, 3, 4, 4\]"),
        (lambda: generator.jump(torch.randn(2, 3, 4, 4), 1.2, 0.1), r"\[2, 3, 4, 4\]"),
        (lambda: generator.schedule(0), "must be at least 1, but it is 0"),
    ):
        with pytest.raises(EdmDistillError, match=why):
            call()


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
