"""Gradients of networks, and how near two of them are."""

import torch
from torch import Tensor, nn


def gradients(value: Tensor, network: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(network.parameters()), allow_unused=True))


def flat(tensors: list[Tensor | None]) -> Tensor:
    assert all(tensor is not None for tensor in tensors), "no gradient"
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry."""
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2g}"
