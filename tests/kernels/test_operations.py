"""The tangents of all operations against finite differences, and their dtypes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.kernels.attention import self_attention, split_heads
from edmdistill.kernels.group_norm import group_norm_silu
from edmdistill.kernels.linear import conv2d, linear
from edmdistill.kernels.resampling import downsample, separable, upsample

NCSN = 1, 3, 3, 1


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: linear(x.mean((2, 3)), torch.ones(3, 8), torch.ones(3)),
    "conv2d": lambda x: conv2d(x, torch.ones(3, 8, 3, 3), torch.ones(3)),
    "down": downsample,
    "down filtered": lambda x: downsample(x, separable(NCSN)),
    "up": upsample,
    "up filtered": lambda x: upsample(x, separable(NCSN)),
    "group_norm_silu": lambda x: group_norm_silu(
        x, torch.ones(8), torch.ones(8), 2, 1e-5, x[..., :1, :1], x[..., -1:, :1]
    ),
    "attention": lambda x: self_attention(split_heads(x.repeat(1, 3, 1, 1).cumsum(1), 2), x),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float32_weights_follow_the_dtype_of_the_input(x: Tensor, name: str, dtype: torch.dtype) -> None:
    assert OPERATIONS[name](x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents(x: Tensor, name: str) -> None:
    operation, tangent, h = OPERATIONS[name], random(*x.shape), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(operation, (x,), (tangent,))
    torch.testing.assert_close(
        found, (operation(x + h * tangent) - operation(x - h * tangent)) / (2 * h), rtol=1e-6, atol=1e-7
    )
