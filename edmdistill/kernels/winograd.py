"""Winograd's convolution of 3x3, with a quarter of the multiplications, for weights that do not change.

A tile of 4x4 pixels of the result takes 36 products for each pair of channels, not 144:

    y = A^T [sum_c (G w_c G^T) * (B^T x_c B)] A,

with x_c a channel of the 6x6 pixels around the tile, and * element by element. G w G^T is made once; the sums over
channels are 36 matrix products. It is for sampling on a CPU: see `pays`.

Source: Lavin & Gray 2016, Fast algorithms for convolutional neural networks, F(4x4, 3x3).  Differs: the points of
interpolation are 0, 2/3, -2/3, 3/2, -3/2 and infinity, not 0, 1, -1, 2, -2 and infinity, whose rounding errors are
twice as large. Errors are about twice those of torch's convolution, and relative to the largest values of the tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import pad

POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)

LEAST_TILES = 16
MOST_BYTES = 64 * 2**20

CHUNK = 64
"""Tiles that are transformed at once, and then stay in the core's cache."""


class FrozenWeight:
    """A weight [M,C,3,3] that hardly ever changes, and its transform.

    Attributes:
        weight: the parameter itself; whoever computes with another must not use this one.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._made_of: tuple[int, int] | None = None
        self._transformed = weight

    @property
    def transformed(self) -> Tensor:
        """G w G^T, four times as large as the weight; made when it is first needed, and if it changed.  [36,C,M]"""
        state = self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version
        if self._made_of != state:
            self._transformed, self._made_of = transform_weight(self.weight.detach()), state
        return self._transformed


def freeze_weights(network: nn.Module) -> None:
    """Lets the layers of a network that have `frozen` keep the transforms of their weights of 3x3."""
    layers: Any = network.modules()
    for layer in layers:
        if hasattr(layer, "frozen") and layer.weight is not None and layer.weight.shape[2:] == (3, 3):
            layer.frozen = FrozenWeight(layer.weight)


def is_frozen(network: nn.Module) -> bool:
    """Returns whether `freeze_weights` was called for a network that has such layers."""
    return any(isinstance(getattr(layer, "frozen", None), FrozenWeight) for layer in network.modules())


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Returns A^T [16,36], B^T [36,36] and G [36,9] as maps of flattened tiles, in float64.

    A polynomial is evaluated at the points, at infinity by its last coefficient: V_k of k coefficients. That of 6
    which is the product of those of 4 and of 3 is found by the inverse of V_6, and the transpose of this algorithm is
    the convolution: A = V_4, G = V_3, B = V_6^-1. The rows of B^T have norm 1, for which those of G make up.
    """
    points = torch.tensor(POINTS, dtype=torch.float64, device="cpu")
    V_3, V_4, V_6 = (torch.cat([torch.linalg.vander(points, N=k), points.new_zeros(1, k)]) for k in (3, 4, 6))
    for V in (V_3, V_4, V_6):
        V[-1, -1] = 1
    B = torch.linalg.inv(V_6)
    norm = torch.linalg.vector_norm(B, dim=0)
    AT, BT, G = V_4.T, (B / norm).T, V_3 * norm[:, None]
    return torch.kron(AT, AT), torch.kron(BT, BT), torch.kron(G, G)


def transform_weight(weight: Tensor) -> Tensor:
    """Returns G w G^T for each pair of channels.  [M,C,3,3] -> [36,C,M]"""
    M, C, *_ = weight.shape
    _, _, G = transforms()
    return (G.to(weight) @ weight.permute(2, 3, 1, 0).reshape(9, C * M)).view(36, C, M)


@cache
def least_channels() -> int:
    """Returns the channels in and out from which Winograd's convolution is faster than oneDNN's on this processor.

    On an Intel Xeon, oneDNN's convolution takes less time than on an AMD EPYC, and this one more. AMX, which computes
    nothing in float32, tells the Xeon from others.
    """
    return 192 if torch.cpu.get_capabilities().get("amx_tile") else 64


def pays(x: Tensor, weight: Tensor) -> bool:
    """Returns whether Winograd's convolution of x, padded by zeros, is possible and faster than torch's.

    It is for images on a CPU in float32, laid out channels-last, without gradients or tangents, not compiled, on one
    thread: with more, each of its many steps waits for all. Sizes are multiples of 4, with 16 tiles or more in a batch;
    channels in and out are `least_channels` or more, and 128 or more for images smaller than 16x16; the transformed
    weight takes at most 64 MiB.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    B, _, H, W = x.shape
    M, C, *_ = weight.shape
    return (
        torch.get_num_threads() == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and H % 4 == W % 4 == 0
        and B * H * W >= 16 * LEAST_TILES
        and min(C, M) >= max(least_channels(), 64 if H * W >= 256 else 128)
        and 4 * 36 * C * M <= MOST_BYTES
    )


def winograd_conv2d(x: Tensor, transformed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution that keeps the resolution, padded by zeros, channels-last.

    Args:
        x: height and width are multiples of 4.  [B,C,H,W]
        transformed: see `transform_weight`.  [36,C,M]
    """
    B, C, H, W = x.shape
    rows, columns, M = H // 4, W // 4, transformed.shape[2]
    AT, BT, _ = (matrix.to(x) for matrix in transforms())
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, channel = padded.stride()
    tiles = padded.as_strided((6, 6, B, rows, columns, C), (row, column, image, 4 * row, 4 * column, channel))
    y = x.new_empty(B, H, W, M)
    parts = y.view(B, rows, 4, columns, 4, M).permute(2, 4, 0, 1, 3, 5)
    size = max(1, CHUNK // (rows * columns)), max(1, CHUNK // columns)
    for group, part in zip(_chunks(tiles, *size), _chunks(parts, *size), strict=True):
        products = torch.bmm((BT @ group.reshape(36, -1)).view(36, -1, C), transformed)
        result = (AT @ products.view(36, -1)).view(part.shape)
        if bias is None:
            part.copy_(result)
        else:
            torch.add(result, bias, out=part)
    return y.permute(0, 3, 1, 2)


def _chunks(tiles: Tensor, images: int, rows: int) -> list[Tensor]:
    """Returns parts of so many images, and of so many rows of tiles each.  [i,j,B,rows,columns,C]"""
    return [part for group in torch.split(tiles, images, 2) for part in torch.split(group, rows, 3)]
