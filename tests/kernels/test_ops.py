"""Operations against their definitions, their tangents against finite differences, and their dtypes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.kernels import ops

BOX, NCSN = (1, 1), (1, 3, 3, 1)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 8, 6, 6, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("taps", [BOX, NCSN])
def test_filters_keep_a_constant(taps: tuple[float, ...]) -> None:
    kernel = ops.separable(taps)
    assert kernel.sum() == 1
    ones = torch.ones(1, 3, 8, 8)
    inside = slice(1, -1)
    torch.testing.assert_close(ops.downsample(ones, kernel)[..., inside, inside], ones[..., :2, :2])
    torch.testing.assert_close(ops.upsample(ones, kernel)[..., inside, inside], torch.ones(1, 3, 14, 14))


def test_the_box_has_two_ways(x: Tensor) -> None:
    kernel = ops.separable(BOX)
    torch.testing.assert_close(ops.downsample(x), ops.downsample(x, kernel))
    torch.testing.assert_close(ops.upsample(x), ops.upsample(x, kernel))
    assert ops.is_box(BOX)
    assert not ops.is_box((1, 3))
    assert not ops.is_box(NCSN)


@pytest.mark.parametrize("taps", [BOX, NCSN])
def test_up_is_the_transpose_of_down(x: Tensor, taps: tuple[float, ...]) -> None:
    kernel = ops.separable(taps)
    y = random(2, 8, 3, 3)
    torch.testing.assert_close((ops.downsample(x, kernel) * y).sum() * 4, (x * ops.upsample(y, kernel)).sum())


def test_downsample_without_border_reads_what_is_there(x: Tensor) -> None:
    kernel = ops.separable(NCSN)
    padded = f.pad(x, [1] * 4)
    torch.testing.assert_close(ops.downsample(padded, kernel, border=False), ops.downsample(x, kernel))


@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_keeps_the_resolution(x: Tensor, size: int) -> None:
    weight = random(5, 8, size, size)
    assert ops.conv2d(x, weight, random(5)).shape == (2, 5, 6, 6)


def test_group_norm_silu(x: Tensor) -> None:
    weight, bias, scale, shift = random(8), random(8), random(2, 8, 1, 1), random(2, 8, 1, 1)
    groups = x.reshape(2, 4, -1)
    normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    normal = normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(ops.group_norm(x, weight, bias, 4, 1e-5), normal)
    torch.testing.assert_close(ops.group_norm_silu(x, weight, bias, 4, 1e-5), f.silu(normal))
    expected = f.silu(normal * (1 + scale) + shift)
    torch.testing.assert_close(ops.group_norm_silu(x, weight, bias, 4, 1e-5, scale, shift), expected)


def test_attention() -> None:
    q, k, v = random(2, 3, 7, 4), random(2, 3, 9, 4), random(2, 3, 9, 4)
    expected = (q @ k.transpose(2, 3) / math.sqrt(4)).softmax(-1) @ v
    torch.testing.assert_close(ops.attention(q, k, v), expected)


def test_self_attention_reads_heads_then_channels_then_qkv(x: Tensor) -> None:
    B, C, heads = 2, 8, 2
    qkv = random(B, 3 * C, 3, 3)
    found = ops.self_attention(ops.split_heads(qkv, heads)).reshape(B, C, 3, 3)
    layout = qkv.reshape(B, heads, C // heads, 3, 9)
    for head in range(heads):
        q, k, v = (layout[:, head, :, i] for i in range(3))  # [B, C/heads, 9]
        weights = (q.transpose(1, 2) @ k / math.sqrt(C // heads)).softmax(-1)
        expected = (v @ weights.transpose(1, 2)).reshape(B, C // heads, 3, 3)
        torch.testing.assert_close(found[:, head * 4 : head * 4 + 4], expected)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: ops.linear(x.mean((2, 3)), torch.ones(3, 8), torch.ones(3)),
    "conv2d": lambda x: ops.conv2d(x, torch.ones(3, 8, 3, 3), torch.ones(3)),
    "down": ops.downsample,
    "down filtered": lambda x: ops.downsample(x, ops.separable(NCSN)),
    "up": ops.upsample,
    "up filtered": lambda x: ops.upsample(x, ops.separable(NCSN)),
    "group_norm_silu": lambda x: ops.group_norm_silu(
        x, torch.ones(8), torch.ones(8), 2, 1e-5, x[..., :1, :1], x[..., -1:, :1]
    ),
    "attention": lambda x: ops.self_attention(ops.split_heads(x.repeat(1, 3, 1, 1).cumsum(1), 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float32_weights_follow_the_dtype_of_the_input(x: Tensor, name: str, dtype: torch.dtype) -> None:
    assert OPERATIONS[name](x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, on first use of jvp
def test_tangents(x: Tensor, name: str) -> None:
    operation, tangent, h = OPERATIONS[name], random(*x.shape), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(operation, (x,), (tangent,))
    torch.testing.assert_close(
        found, (operation(x + h * tangent) - operation(x - h * tangent)) / (2 * h), rtol=1e-6, atol=1e-7
    )
