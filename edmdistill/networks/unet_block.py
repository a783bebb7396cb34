"""The layers and the residual block that DDPM++, NCSN++ and ADM share.

Parameter and buffer names are the official ones. Weights are initialized as torch's layers are, like ADM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from edmdistill.kernels.attention import require_heads, self_attention, split_heads
from edmdistill.kernels.dropout import dropout
from edmdistill.kernels.group_norm import group_norm, group_norm_silu
from edmdistill.kernels.linear import conv2d, linear
from edmdistill.kernels.resampling import downsample, is_box, separable, upsample, upsampled_conv2d
from edmdistill.kernels.winograd import FrozenWeight
from edmdistill.networks.base import Conditioning, Network, ResidualBlock


class Linear(nn.Linear):
    """A linear map in the dtype of its input.  [B,N] -> [B,M]"""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Resampling, then a convolution in the dtype of its input; kernel 0 = resampling alone.

    Args:
        resample: keep, down (half the resolution) or up (twice).
        resample_filter: taps of the separable low-pass filter, an even number.
        fused: convolve first, with a margin as wide as the filter needs; for down only.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        resample: str = "keep",
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        layer = nn.Conv2d(in_channels, out_channels, kernel) if kernel else None
        self.weight = layer.weight if layer else None
        self.bias = layer.bias if layer else None
        self.frozen: FrozenWeight | None = None
        self.resample = resample
        self.fused = fused
        self.box = is_box(resample_filter)
        self.register_buffer("resample_filter", None if resample == "keep" else separable(resample_filter))

    def convolve(self, x: Tensor) -> Tensor:
        return x if self.weight is None else conv2d(x, self.weight, self.bias, self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        low_pass = None if self.box else self.resample_filter
        if self.fused:
            margin = 0 if low_pass is None else low_pass.shape[-1] // 2 - 1
            return downsample(self.convolve(pad(x, [margin] * 4)), low_pass, border=False)
        if self.resample == "down":
            x = downsample(x, low_pass)
        elif self.resample == "up":
            if self.box and self.weight is not None:
                return upsampled_conv2d(x, self.weight, self.bias)
            x = upsample(x, low_pass)
        return self.convolve(x)


class GroupNorm(nn.GroupNorm):
    """Group norm with 32 groups, fewer if a group would have less than `least` channels.  [B,C,H,W]"""

    def __init__(self, channels: int, eps: float, least: int = 4) -> None:
        super().__init__(min(32, channels // least), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class GroupNormSiLU(GroupNorm):
    """silu(norm(x) (1 + scale) + shift).  x [B,C,H,W]; scale and shift [B,C,1,1], None = 0"""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, scale, shift)


class UNetBlock(ResidualBlock):
    """Two convolutions beside a skip connection, conditioned by the embedding, then optional self-attention.

    Args:
        num_heads: 0 = no attention.
        skip_scale: factor of each sum of branches.
        resample_proj: whether a skip connection that resamples has a convolution even if the channels do not change.
        adaptive_scale: whether the embedding scales and shifts after the second norm (ADM), or is added before it.
        double_norm: whether scale and shift are normalized; see ResidualBlock.
        group_channels: the fewest channels of a group of the norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        num_heads: int = 0,
        resample: str = "keep",
        resample_filter: Sequence[float] = (1, 1),
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        double_norm: bool = False,
        group_channels: int = 4,
    ) -> None:
        super().__init__()
        require_heads(out_channels, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.mod_gain = nn.Parameter(torch.ones(2)) if double_norm else None
        self.norm0 = GroupNormSiLU(in_channels, eps, group_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample, resample_filter)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNormSiLU(out_channels, eps, group_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or resample != "keep":
            kernel = 1 if in_channels != out_channels or resample_proj else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, resample, resample_filter)
        if num_heads:
            self.norm2 = GroupNorm(out_channels, eps, group_channels)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        scale, shift = self.affine(emb).chunk(2, dim=1)
        return scale + 1, shift

    def forward(self, x: Tensor, emb: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """x [B,C,H,W], emb [B,emb_channels], dropout_keys [B] -> [B,out_channels,H',W']"""
        y = self.conv0(self.norm0(x))
        if self.mod_gain is None:
            condition = self.affine(emb)
        else:
            scale, shift = self.normalized_modulations(emb)
            condition = torch.cat([scale - 1, shift], dim=1)
        condition = condition[:, :, None, None].to(y.dtype)
        y = self.norm1(y, *condition.chunk(2, dim=1)) if self.adaptive_scale else self.norm1(y + condition)
        y = self.conv1(dropout(y, self.dropout, dropout_keys, self.layer))
        x = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            y = self_attention(split_heads(self.qkv(self.norm2(x)), self.num_heads), x)
            x = (self.proj(y) + x) * self.skip_scale
        return x


class EDMUNet(Network):
    """The base of DDPM++, NCSN++ and ADM: how time and augmentation are embedded.

    Attributes:
        map_noise: c_noise -> features.
        map_layer0, map_layer1: features -> embedding.
        map_augment: augmentation labels -> features; None for a network without them.
        split_times: whether the blocks map the embeddings of both times separately, not their sum: the sum of two maps
            is one of both embeddings side by side.  Source: sony/ctm, cm/unet.py; Kim-Dongjun/ctm-cifar10,
            cm/networks.py.
    """

    map_noise: nn.Module
    map_augment: Linear | None

    def __init__(self, arguments: dict[str, Any], img_channels: int) -> None:
        super().__init__(arguments, img_channels)
        self.split_times: bool = arguments["split_times"]
        if self.split_times and not self.two_time:
            raise ValueError("split_times is for two times: set two_time too")

    def embed(self, condition: Conditioning) -> Tensor:
        if not self.split_times:
            return super().embed(condition)
        assert self.second_time is not None
        second = condition.c_noise if condition.c_noise_second is None else condition.c_noise_second
        emb_t = super().embed(condition._replace(c_noise_second=None))
        emb_s = self.embed_time(self.second_time, second, self.early_embedding(condition))
        emb_s = silu(self.second_time.gain * emb_s)
        return torch.cat([emb_t + 0 * emb_s, emb_s + 0 * emb_t], dim=1)  # broadcast: one may have a single row

    def embed_time(self, layers: Any, c_noise: Tensor, early: Tensor | float = 0.0) -> Tensor:
        emb: Tensor = layers.map_layer1(silu(layers.map_layer0(layers.map_noise(c_noise) + early)))
        return emb

    def early_embedding(self, condition: Conditioning) -> Tensor | float:
        if self.map_augment is None or condition.augment_labels is None:
            return 0.0
        features: Tensor = self.map_augment(condition.augment_labels.to(condition.c_noise.dtype))
        return features
