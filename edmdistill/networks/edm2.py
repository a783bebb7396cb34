"""EDM2's U-Net: magnitude-preserving layers, weights of unit rms, no biases, no group norm.

Parameter names are the official ones. Weights are normalized in every forward pass. Official training also writes the
normalized weights back there; here `after_step` does, because inside forward it breaks JVP, DDP, compile and
checkpointing.

Source: Karras et al. 2024 (EDM2), figure 21, config G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, silu

from edmdistill.kernels.attention import require_heads, self_attention, split_heads
from edmdistill.kernels.dropout import dropout
from edmdistill.kernels.magnitude import SILU_RMS, mp_cat, mp_sum_factors, normalize
from edmdistill.kernels.resampling import downsample, is_box, separable, upsample
from edmdistill.networks.arguments import Arg
from edmdistill.networks.base import Conditioning, Network, ResidualBlock
from edmdistill.networks.embeddings import TimeEmbedding
from edmdistill.networks.levels import Layer, UNetLevels
from edmdistill.networks.magnitude import MPConv, MPFourier


class Block(ResidualBlock):
    """Encoder or decoder block with optional resampling and self-attention.  Source: EDM2, figure 21."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str,
        resample: str = "keep",
        attention: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        double_norm: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample = resample
        self.resample_filter = resample_filter
        self.num_heads = out_channels // channels_per_head if attention else 0
        require_heads(out_channels, self.num_heads)
        self.dropout = dropout
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.mod_gain = nn.Parameter(torch.ones(1)) if double_norm else None
        self.skip_factor, factor = mp_sum_factors(res_balance)
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, 3, 1 / SILU_RMS)
        self.emb_linear = MPConv(emb_channels, out_channels, factor=1 / SILU_RMS)
        self.conv_res1 = MPConv(out_channels, out_channels, 3, factor / SILU_RMS)
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, 1, self.skip_factor if flavor == "dec" else 1.0)
        if self.num_heads:
            self.attn_factor, factor = mp_sum_factors(attn_balance)
            self.attn_qkv = MPConv(out_channels, out_channels * 3, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1, factor)

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        return (self.emb_linear(emb, self.emb_gain) + 1,)

    def forward(self, x: Tensor, emb: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        # Main branch.
        before = x
        if self.resample == "down":
            x = downsample(x, self.low_pass(x))
        elif self.resample == "up":
            x = upsample(x, self.low_pass(x))
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, 1)

        # Residual branch.
        upsampled = self.resample == "up" and is_box(self.resample_filter)
        y = self.conv_res0(silu(before if upsampled else x), upsampled=upsampled)
        (scale,) = self.modulations(emb) if self.mod_gain is None else self.normalized_modulations(emb)
        y = silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(dropout(y, self.dropout, dropout_keys, self.layer))

        # Connect the branches.
        if self.flavor == "dec" and self.conv_skip is not None:
            x = y + self.conv_skip(x)
        else:
            x = torch.add(y, x, alpha=self.skip_factor)

        if self.num_heads:
            x = torch.add(self.attn_proj(self.attend(x)), x, alpha=self.attn_factor)
        return x if self.clip_act is None else hardtanh(x, -self.clip_act, self.clip_act)

    def low_pass(self, x: Tensor) -> Tensor | None:
        """Returns the resampling filter, which the official state does not hold; None = the box filter."""
        return None if is_box(self.resample_filter) else separable(self.resample_filter, "cpu").to(x.device)

    def attend(self, x: Tensor) -> Tensor:
        """Returns self-attention over pixels, with q, k, v at unit rms; channels are [heads, C/heads, 3]."""
        qkv = split_heads(self.attn_qkv(x), self.num_heads)
        return self_attention(normalize(qkv, 4), x)


BALANCES = "res_balance", "attn_balance"
BLOCK_OPTIONS = *BALANCES, "resample_filter", "channels_per_head", "dropout", "clip_act", "double_norm"
"""Arguments of the network that are those of each block."""


class UNet(Network):
    """EDM2's U-Net.  x [B,C,H,W] -> F [B,C,H,W].  All but the last six arguments are the official class's.

    Args:
        double_norm: whether the blocks normalize their modulations; see ResidualBlock.
        label_dropout: fraction of labels that training sets to zero.  Source: sCM, appendix G.1.

    Differs: `logvar_channels` is an argument of the official preconditioner; here the network has that head too
    (`logvars`).
    """

    time_layers = "emb_fourier", "emb_noise"

    def __init__(
        self,
        img_resolution: Arg.Resolution,
        img_channels: Arg.ImageChannels,
        label_dim: Arg.Classes,
        model_channels: Arg.Channels = 192,
        channel_mult: Arg.Multipliers = (1, 2, 3, 4),
        channel_mult_noise: Arg.Count | None = None,
        channel_mult_emb: Arg.Count | None = None,
        num_blocks: Arg.Blocks = 3,
        attn_resolutions: Arg.Resolutions = (16, 8),
        label_balance: Arg.Fraction = 0.5,
        concat_balance: Arg.Fraction = 0.5,
        resample_filter: Arg.Taps = (1, 1),
        channels_per_head: Arg.Channels = 64,
        dropout: Arg.Dropout = 0.0,
        res_balance: Arg.Fraction = 0.3,
        attn_balance: Arg.Fraction = 0.3,
        clip_act: Arg.Limit | None = 256.0,
        logvar_channels: Arg.OptionalChannels = 128,
        logvar_heads: Arg.Count = 1,
        two_time: bool = False,
        positional_time: bool = False,
        double_norm: bool = False,
        guided: bool = False,
        label_dropout: Arg.Fraction = 0.0,
    ) -> None:
        super().__init__(locals(), img_channels)
        self.label_dropout = label_dropout
        self.concat_balance = concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.emb_channels = emb_channels

        levels = UNetLevels(img_resolution, widths[0], widths, num_blocks, attn_resolutions)

        options = {name: self.arguments[name] for name in BLOCK_OPTIONS}

        def block(layer: Layer, flavor: str) -> Block:
            shape = layer.in_channels, layer.out_channels, emb_channels
            return Block(*shape, flavor, layer.resample, layer.attention, **options)

        # Embedding.
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = (TimeEmbedding if positional_time else MPFourier)(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = None
        if label_dim:
            self.time_factor, factor = mp_sum_factors(label_balance)
            self.emb_label = MPConv(label_dim, emb_channels, factor=factor * math.sqrt(label_dim))
        self.add_optional_layers()

        # Encoder.  A channel of ones beside the image replaces biases.
        encoder = [layer for layers in levels.encoder() for layer in layers]
        self.feature_layers = levels.last_layers()
        self.enc = nn.ModuleDict({encoder[0].name: MPConv(img_channels + 1, encoder[0].out_channels, 3)})
        for layer in encoder[1:]:
            self.enc[layer.name] = block(layer, "enc")

        # Decoder.
        decoder = [layer for layers in levels.decoder() for layer in layers]
        self.dec = nn.ModuleDict({layer.name: block(layer, "dec") for layer in decoder})
        self.out_conv = MPConv(decoder[-1].out_channels, img_channels, 3)
        self.number_blocks()

    def embed_time(self, layers: Any, c_noise: Tensor, early: Tensor | float = 0.0) -> Tensor:
        emb: Tensor = layers.emb_noise(layers.emb_fourier(c_noise))
        return emb

    def finish_embedding(self, emb: Tensor, condition: Conditioning) -> Tensor:
        if self.emb_label is not None:
            labels = self.drop_labels(condition, emb)
            emb = self.emb_label(labels) + emb * self.time_factor  # torch.compile drops add's alpha after a linear map
        return silu(emb)

    def encode(self, x: Tensor, emb: Tensor, dropout_keys: Tensor | None) -> list[Tensor]:
        return super().encode(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), emb, dropout_keys)

    def decode(self, skips: list[Tensor], emb: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = skips[-1]
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = layer(x, emb, dropout_keys)
        out: Tensor = self.out_conv(x, self.out_gain)
        return out

    def logvar_linear_map(self, channels: int, heads: int) -> nn.Module:
        """Returns the official map, of unit variance from the start."""
        return MPConv(channels, heads)
