"""Group normalization against its definition."""

import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.kernels.group_norm import group_norm, group_norm_silu


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_group_norm_silu(x: Tensor) -> None:
    weight, bias, scale, shift = random(8), random(8), random(2, 8, 1, 1), random(2, 8, 1, 1)
    groups = x.reshape(2, 4, -1)
    normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    normal = normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(group_norm(x, weight, bias, 4, 1e-5), normal)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4, 1e-5), f.silu(normal))
    expected = f.silu(normal * (1 + scale) + shift)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4, 1e-5, scale, shift), expected)
