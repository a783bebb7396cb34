"""Weighted sums of losses, by hand."""

import pytest
import torch

from edmdistill.methods.weighting import balanced_sum, gradient_balance

LOSSES = {"distance": torch.tensor([1.0, 3.0]), "gan": torch.tensor([2.0, 6.0]), "dsm": torch.tensor([10.0, 20.0])}


def test_fixed_weights_are_those_given() -> None:
    """Or 1; the reference has none among the signals."""
    value, signals = balanced_sum(LOSSES, {"gan": 0.5}, None)
    torch.testing.assert_close(value, torch.tensor([12.0, 26.0]))
    means = {"distance": 2, "gan": 4, "dsm": 15, "lambda_gan": 0.5, "lambda_dsm": 1}
    assert {name: float(signal) for name, signal in signals.items()} == means


def test_adaptive_weights_are_ratios_of_gradients() -> None:
    gradients = {"distance": torch.tensor([3.0, 4.0]), "gan": torch.tensor([0.0, 1.0]), "dsm": torch.tensor([2.0, 0.0])}
    value, signals = balanced_sum(LOSSES, {"gan": 0.5}, gradients)
    gan, dsm = 0.5 * 5 / (1 + 1e-4), 5 / (2 + 1e-4)
    assert value.tolist() == pytest.approx([1 + 2 * gan + 10 * dsm, 3 + 6 * gan + 20 * dsm])
    assert [float(signals[f"lambda_{name}"]) for name in ("gan", "dsm")] == pytest.approx([gan, dsm])


def test_the_adversary_s_weight_has_bounds() -> None:
    large, small = torch.full((2,), 1e3), torch.full((2,), 1e-3)
    assert float(gradient_balance({"distance": small, "gan": large}, "gan", "distance")) == pytest.approx(0.01)
    assert float(gradient_balance({"distance": large, "gan": small}, "gan", "distance")) == pytest.approx(10)
    assert float(gradient_balance({"distance": small, "dsm": large}, "dsm", "distance")) == pytest.approx(1e-6)
