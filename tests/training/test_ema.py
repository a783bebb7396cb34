import pytest
import torch
from torch import nn

from edmdistill.training.ema import Ema


def test_closed_form():
    """Constant weights w after w0: the average is w + (w0 - w) 0.5^(images / half_life)."""
    network = nn.Linear(3, 2).double()
    start = [p.clone() for p in network.parameters()]
    ema = Ema(network, half_life_images=70, rampup_ratio=None)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    for step in range(20):
        ema.update(network, 10 * step, 10)
    for average, now, then in zip(ema.network.parameters(), network.parameters(), start, strict=True):
        torch.testing.assert_close(average, now + (then - now) * 0.5 ** (200 / 70), rtol=1e-14, atol=0)


def test_ramp_up_shortens_the_half_life():
    ema = Ema(nn.Linear(1, 1), half_life_images=1000, rampup_ratio=0.05)
    assert ema.beta(0, 10) == 0  # the first step is taken whole
    assert ema.beta(2000, 100) == pytest.approx(0.5)  # half-life 100
    assert ema.beta(10**6, 1000) == pytest.approx(0.5)  # half-life 1000


def test_buffers_are_copied_and_the_network_is_left_alone():
    network = nn.BatchNorm1d(2)
    ema = Ema(network, 100, None)
    network(torch.randn(8, 2))
    ema.update(network, 0, 10)
    assert torch.equal(ema.network.running_mean, network.running_mean)
    assert ema.network.num_batches_tracked == 1
    assert not ema.network.training
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in ema.network.parameters())
