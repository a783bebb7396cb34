"""The network of FID's Inception-v3 of 2015-12-05, as TensorFlow's frozen graph computes it.

Source: Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision.
Differs: the means of 3x3 pixels leave out the padding, and the last block takes maxima, as in the frozen graph.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as f
from torch import Tensor, nn


class FrozenBatchNorm(nn.Module):
    """Batch normalization by the statistics of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return f.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)  # type: ignore[arg-type]


class Conv(nn.Module):
    """A convolution, batch normalization and ReLU.  It keeps the size, unless `pad` is False."""

    def __init__(
        self, channels: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return f.relu(self.bn(self.conv(x)), inplace=True)


def halving(channels: int, out: int) -> Conv:
    """Returns a 3x3 convolution to half the size, without padding."""
    return Conv(channels, out, (3, 3), stride=2, pad=False)


def chain(x: Tensor, *layers: nn.Module) -> Tensor:
    """Applies layers one after another."""
    return reduce(lambda y, layer: layer(y), layers, x)


def average(x: Tensor) -> Tensor:
    """Returns the means of 3x3 pixels, of those inside the image alone, as TensorFlow does.  [B,C,H,W] -> [B,C,H,W]"""
    return f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class MixedA(nn.Module):
    """35x35 pixels: 1x1, 5x5 and two 3x3 convolutions."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64)
        self.branch5x5_1 = Conv(channels, 48)
        self.branch5x5_2 = Conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = Conv(channels, 64)
        self.branch3x3dbl_2 = Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3))
        self.branch_pool = Conv(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        five = chain(x, self.branch5x5_1, self.branch5x5_2)
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat((one, five, three, self.branch_pool(average(x))), 1)


class MixedB(nn.Module):
    """From 35x35 to 17x17 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = halving(channels, 384)
        self.branch3x3dbl_1 = Conv(channels, 64)
        self.branch3x3dbl_2 = Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = halving(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat((self.branch3x3(x), double, f.max_pool2d(x, 3, 2)), 1)


class MixedC(nn.Module):
    """17x17 pixels: 7x7 convolutions as pairs of 1x7 and 7x1."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 192)
        self.branch7x7_1 = Conv(channels, inner)
        self.branch7x7_2 = Conv(inner, inner, (1, 7))
        self.branch7x7_3 = Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(channels, inner)
        self.branch7x7dbl_2 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Conv(inner, 192, (1, 7))
        self.branch_pool = Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat((self.branch1x1(x), seven, double, self.branch_pool(average(x))), 1)


class MixedD(nn.Module):
    """From 17x17 to 8x8 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192)
        self.branch3x3_2 = halving(192, 320)
        self.branch7x7x3_1 = Conv(channels, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = halving(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat((three, seven, f.max_pool2d(x, 3, 2)), 1)


class MixedE(nn.Module):
    """8x8 pixels: paths that end on 1x3 and 3x1 convolutions side by side.

    Args:
        maximum: whether the last path takes maxima, not means: the last block of the TensorFlow graph does.
    """

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Conv(channels, 320)
        self.branch3x3_1 = Conv(channels, 384)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(channels, 448)
        self.branch3x3dbl_2 = Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = f.max_pool2d(x, 3, 1, 1) if self.maximum else average(x)
        return torch.cat(
            (
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ),
            1,
        )


class InceptionV3(nn.Module):
    """The network.  Its tensors carry torchvision's names, as in pytorch-fid's file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = halving(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), pad=False)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, 128)
        self.Mixed_6c = MixedC(768, 160)
        self.Mixed_6d = MixedC(768, 160)
        self.Mixed_6e = MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, maximum=False)
        self.Mixed_7c = MixedE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features before the classifier.  [B,3,299,299] in [-1, 1] -> [B,2048]"""
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = chain(f.max_pool2d(x, 3, 2), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = chain(f.max_pool2d(x, 3, 2), self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        x = chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        return chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c).mean((2, 3))
