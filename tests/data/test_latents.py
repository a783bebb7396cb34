"""Latents: the official encoder's numbers, and noise that belongs to a visit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edmdistill.checkpoints.encoder import LatentEncoder, latent_encoder
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.data.latents import channel_statistics, draw_latents, latent_noise
from edmdistill.draws import Draws
from edmdistill.errors import CheckpointError


def test_the_official_encoder(golden: Path) -> None:
    """A converted teacher's statistics give the official latents, from the same moments and noise."""
    case = load_file(golden / "encoders-edm2.safetensors")
    config = build_official(read_official(golden / "edm2-latent-cond.pkl"))[1]
    statistics = latent_encoder(config.encoder)
    assert statistics is not None
    x0 = draw_latents(case["vae.raw_mean_std"], case["vae.noise"], statistics)
    assert x0.dtype == torch.float32
    assert torch.equal(x0, case["vae.final_latents"])


def test_what_is_no_vae() -> None:
    assert latent_encoder({"kind": "pixels"}) is None
    with pytest.raises(CheckpointError, match=r"encoder 'NewEncoder' does not say how latents are scaled .*`scale`"):
        latent_encoder({"kind": "NewEncoder", "bias": [0.0]})


def test_a_visit_has_its_own_noise() -> None:
    whole = latent_noise(3, 0, 300, 4, 2, 2)
    parts = [latent_noise(3, start, stop, 4, 2, 2) for start, stop in [(0, 1), (1, 70), (70, 300)]]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.flatten().unique()) > 0.99 * whole.numel()
    assert abs(float(whole.mean())) < 0.05
    assert abs(float(whole.std()) - 1) < 0.05
    assert not torch.equal(latent_noise(4, 0, 300, 4, 2, 2), whole)
    turn = Draws([3, 7, 0], 1).normal(4, 2, 2, dtype=torch.float32)  # seed, round, turn
    assert not torch.equal(turn, whole[7:8])


def test_draws_have_the_moments_that_are_stored() -> None:
    moments = torch.tensor([3.0, -1.0, 2.0, 0.0]).reshape(1, 4, 1, 1).expand(4000, 4, 1, 1)
    x0 = draw_latents(
        moments,
        latent_noise(0, 0, 4000, 2, 1, 1),
        LatentEncoder("StabilityVAEEncoder", scale=(0.5, 2.0), bias=(1.0, -1.0)),
    )
    assert x0.mean(0).flatten().tolist() == pytest.approx([2.5, -3], abs=0.05)
    assert x0.std(0).flatten().tolist() == pytest.approx([1, 0], abs=0.05)


def test_the_spread_is_that_of_what_is_drawn() -> None:
    torch.manual_seed(0)
    moments = torch.cat([2 * torch.randn(300, 2, 4, 4) + 1, 3 * torch.rand(300, 2, 4, 4)], dim=1)
    statistics = LatentEncoder("StabilityVAEEncoder", scale=(0.5, 2.0), bias=(1.0, -1.0))
    x0 = draw_latents(moments, latent_noise(0, 0, 300, 2, 4, 4), statistics)
    for channel, (mean, std) in enumerate(zip(*channel_statistics(moments), strict=True)):
        scale, bias = statistics.scale[channel], statistics.bias[channel]
        assert mean * scale + bias == pytest.approx(float(x0[:, channel].mean()), abs=0.1)
        assert std * scale == pytest.approx(float(x0[:, channel].std()), rel=0.03)
