"""Attention against its definition."""

import math

import pytest
import torch
from torch import Tensor

from edmdistill.kernels.attention import attention, self_attention, split_heads


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_attention() -> None:
    q, k, v = random(2, 3, 7, 4), random(2, 3, 9, 4), random(2, 3, 9, 4)
    expected = (q @ k.transpose(2, 3) / math.sqrt(4)).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v), expected)


def test_self_attention_reads_heads_then_channels_then_qkv(x: Tensor) -> None:
    B, C, heads = 2, 8, 2
    qkv = random(B, 3 * C, 3, 3)
    y = self_attention(split_heads(qkv, heads), random(B, C, 3, 3))
    layout = qkv.reshape(B, heads, C // heads, 3, 9)
    for head in range(heads):
        q, k, v = (layout[:, head, :, i] for i in range(3))  # [B, C/heads, 9]
        weights = (q.transpose(1, 2) @ k / math.sqrt(C // heads)).softmax(-1)
        expected = (v @ weights.transpose(1, 2)).reshape(B, C // heads, 3, 3)
        torch.testing.assert_close(y[:, head * 4 : head * 4 + 4], expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_self_attention_keeps_the_layout_of_images(heads: int) -> None:
    x = random(2, 8, 4, 4)
    layouts = {layout: x.contiguous(memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last)}
    results = [self_attention(split_heads(image.repeat(1, 3, 1, 1), heads), image) for image in layouts.values()]
    for layout, result in zip(layouts, results, strict=True):
        assert result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(*results)
