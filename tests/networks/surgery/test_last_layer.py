"""What is read from the last layer."""

import pytest
import torch

from edmdistill.networks.magnitude import MPConv
from edmdistill.networks.surgery.last_layer import watched


def test_the_last_layers_gradient_is_autograds() -> None:
    """For losses that depend on two calls or on one of them; the layer's own gradient stays empty."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 2, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    with watched(layer) as last:
        one, two = layer(x[0]).tanh(), layer(x[1]).sin()
        layer(x[1])
    for loss in (one.square().sum() + two.sum(), two.sum()):
        (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        torch.testing.assert_close(last.gradient(loss), expected.flatten(), rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None
    layer(x[0])
    assert len(last.calls) == 3


def test_the_weight_is_that_of_the_call() -> None:
    """A sharded layer has its weight only then; MPConv's gradient depends on it."""
    torch.manual_seed(0)
    layer, x = MPConv(4, 3), torch.randn(5, 4, requires_grad=True)
    with watched(layer) as last:
        loss = layer(x).square().sum()
    assert not last.calls[0].arguments[0].requires_grad, "the graph before the layer need not stay"
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    layer.weight.data.zero_()
    torch.testing.assert_close(last.gradient(loss), expected.flatten())


def test_only_calls_with_a_gradient_are_recorded() -> None:
    layer = torch.nn.Linear(3, 2)
    with watched(layer) as last, torch.no_grad():
        layer(torch.randn(1, 3))
    assert not last.calls


@pytest.mark.parametrize("size", [0.02, 2.0])
def test_slopes_of_many_numbers_do_not_underflow_in_half_precision(size: float) -> None:
    """Those of a mean are as small as numbers are many; losses are balanced before their loss scale is known.

    Nor do they overflow, where the slope in the weight, a sum of as many, is of unit size.
    """
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 3, 1, bias=False)
    x = torch.randn(16, 4, 64, 64)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        with watched(layer) as last, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = (size * layer(x).float()).square().mean()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            gradients.append(last.gradient(loss))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-3, atol=1e-6)
