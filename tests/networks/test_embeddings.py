"""Embeddings of times and weights: their frequencies, and their size."""

import math

import pytest
import torch

from edmdistill.networks.embeddings import FourierEmbedding, GuidanceEmbedding, PositionalEmbedding, TimeEmbedding
from edmdistill.networks.magnitude import MPFourier

C = torch.tensor([0.0, 0.3, -1.7], dtype=torch.float64)


def test_the_positional_embedding_has_geometric_frequencies() -> None:
    """1 ... 1/10000 with the endpoint; without it, that is the first which is left out."""
    for endpoint, last in ((True, 1e-4), (False, 1e-4 ** (3 / 4))):
        angles = C[:, None] * torch.tensor([last ** (k / 3) for k in range(4)], dtype=torch.float64)
        found = PositionalEmbedding(8, endpoint)(C)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], 1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(PositionalEmbedding(8, endpoint, sin_first=True)(C), found.roll(4, 1))


@torch.no_grad()
def test_times_and_guidance_weights_turn_by_4_at_most() -> None:
    guidance, time = GuidanceEmbedding(1), TimeEmbedding(1)
    for weight in guidance.weight, time.mix.weight:
        weight.zero_()[0, 0] = 1
    for embedding in guidance.double(), time.double():
        torch.testing.assert_close(embedding(C), (4 * C).cos()[:, None])


@torch.no_grad()
def test_a_new_time_embedding_has_unit_size_at_every_time() -> None:
    torch.manual_seed(0)
    rms = TimeEmbedding(4000)(torch.linspace(0, math.pi / 2, 9)).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.ones(9), rtol=0.05, atol=0)


def test_fourier_features_are_random_as_the_papers() -> None:
    """NCSN++: angles 2 pi c N(0, 16^2); EDM2: c N(0, (2 pi)^2) + U[0, 2 pi), and sqrt(2) cosines."""
    torch.manual_seed(0)
    ncsnpp, edm2 = FourierEmbedding(20000), MPFourier(10000)
    angles = 2 * math.pi * 0.01 * ncsnpp.freqs
    torch.testing.assert_close(ncsnpp(torch.tensor([0.01]))[0], torch.cat([angles.sin(), angles.cos()]))
    assert ncsnpp.freqs.std() == pytest.approx(16, rel=0.03)
    assert edm2.freqs.std() == pytest.approx(2 * math.pi, rel=0.03)
    turns = (edm2.phases / (2 * math.pi)).sort().values
    assert (turns - torch.linspace(0, 1, 10000)).abs().max() < 1.95 / 100  # Kolmogorov, 0.1%
    expected = math.sqrt(2) * (0.3 * edm2.freqs + edm2.phases).cos()
    torch.testing.assert_close(edm2(torch.tensor([0.3]))[0], expected, rtol=1e-5, atol=1e-5)


def test_sines_and_cosines_come_in_pairs() -> None:
    for channels in (2, 7):
        with pytest.raises(ValueError, match=f"has {channels} channels, but must have an even number of at least 4"):
            PositionalEmbedding(channels)
    with pytest.raises(ValueError, match="has 7 channels, but must have an even number"):
        FourierEmbedding(7)
