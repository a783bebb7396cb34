"""DDPM++ and NCSN++, the U-Nets of score-based modeling, as EDM trains them.

Source: Song et al. 2021 (score SDE), appendix H; Karras et al. 2022 (EDM), table 7.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from edmdistill.networks.arguments import Arg
from edmdistill.networks.base import Conditioning
from edmdistill.networks.embeddings import FourierEmbedding, PositionalEmbedding, TimeEmbedding
from edmdistill.networks.levels import Layer, UNetLevels
from edmdistill.networks.unet_block import Conv2d, EDMUNet, GroupNormSiLU, Linear, UNetBlock


class SongUNet(EDMUNet):
    """x [B,in_channels,H,W] -> F [B,out_channels,H,W].  All but the last six arguments are the official class's.

    DDPM++ has positional embeddings, a standard encoder and decoder, filter [1, 1] and channel_mult_noise 1; NCSN++
    has Fourier embeddings, a residual encoder, filter [1, 3, 3, 1] and channel_mult_noise 2.

    Args:
        embedding_type: positional or fourier.
        encoder_type: standard; skip adds the downsampled image at every level, residual the downsampled features.
        decoder_type: standard; skip: every level adds its image to the upsampled one.
        label_dropout: fraction of labels that training sets to zero.
        split_times: see EDMUNet.
    """

    def __init__(
        self,
        img_resolution: Arg.Resolution,
        in_channels: Arg.ImageChannels,
        out_channels: Arg.ImageChannels,
        label_dim: Arg.Classes = 0,
        augment_dim: Arg.OptionalChannels = 0,
        model_channels: Arg.Channels = 128,
        channel_mult: Arg.Multipliers = (1, 2, 2, 2),
        channel_mult_emb: Arg.Count = 4,
        num_blocks: Arg.Blocks = 4,
        attn_resolutions: Arg.Resolutions = (16,),
        dropout: Arg.Dropout = 0.10,
        label_dropout: Arg.Fraction = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: Arg.Count = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Arg.Taps = (1, 1),
        two_time: bool = False,
        logvar_channels: Arg.OptionalChannels = 0,
        logvar_heads: Arg.Count = 1,
        positional_time: bool = False,
        guided: bool = False,
        split_times: bool = False,
    ) -> None:
        super().__init__(locals(), in_channels)
        self.label_dropout = label_dropout
        self.emb_channels = emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        widths = [model_channels * mult for mult in channel_mult]
        levels = UNetLevels(img_resolution, model_channels, widths, num_blocks, attn_resolutions)

        def block(layer: Layer) -> UNetBlock:
            return UNetBlock(
                layer.in_channels,
                layer.out_channels,
                emb_channels * (2 if split_times else 1),
                num_heads=int(layer.attention),
                resample=layer.resample,
                resample_filter=resample_filter,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_proj=True,
                adaptive_scale=False,
            )

        # Embedding.
        if positional_time:
            self.map_noise = TimeEmbedding(noise_channels)
        elif embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True, sin_first=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        # Encoder.
        self.enc = nn.ModuleDict()
        caux = in_channels
        self.feature_layers = levels.last_layers()
        for entrance, *blocks in levels.encoder():
            cout, aux = entrance.out_channels, f"{entrance.resolution}x{entrance.resolution}_aux"
            first = entrance.role == "conv"
            self.enc[entrance.name] = Conv2d(in_channels, cout, 3) if first else block(entrance)
            if encoder_type == "skip" and not first:
                self.enc[f"{aux}_down"] = Conv2d(caux, caux, 0, "down", resample_filter)
                self.enc[f"{aux}_skip"] = Conv2d(caux, cout, 1)
            elif encoder_type == "residual" and not first:
                self.enc[f"{aux}_residual"] = Conv2d(caux, cout, 3, "down", resample_filter, fused=True)
                caux = cout
            for layer in blocks:
                self.enc[layer.name] = block(layer)

        # Decoder.
        self.dec = nn.ModuleDict()
        for layers in levels.decoder(attend_last=True):
            for layer in layers:
                self.dec[layer.name] = block(layer)
            cout, aux = layer.out_channels, f"{layer.resolution}x{layer.resolution}_aux"
            if decoder_type == "skip" and layers[0].role == "up":
                self.dec[f"{aux}_up"] = Conv2d(out_channels, out_channels, 0, "up", resample_filter)
            if decoder_type == "skip" or layer.resolution == img_resolution:
                self.dec[f"{aux}_norm"] = GroupNormSiLU(cout, eps=1e-6)
                self.dec[f"{aux}_conv"] = Conv2d(cout, out_channels, 3)

        self.initialize()
        self.add_optional_layers()
        self.number_blocks()

    def initialize(self) -> None:
        """Initializes weights as Xavier's uniform, biases as 0; residual branches end in weights of nearly 0."""
        for name, layer in self.named_modules():
            if isinstance(layer, (Linear, Conv2d)) and layer.weight is not None:
                closes = name.endswith(("conv1", "proj", "aux_conv"))
                nn.init.xavier_uniform_(layer.weight, 1e-5 if closes else math.sqrt(0.2) if name.endswith("qkv") else 1)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def last_layer(self) -> nn.Module:
        return list(self.dec.values())[-1]

    def early_embedding(self, condition: Conditioning) -> Tensor | float:
        augmentation = super().early_embedding(condition)
        if self.map_label is None:
            return augmentation
        labels: Tensor = self.map_label(self.drop_labels(condition, condition.c_noise) * math.sqrt(self.label_dim))
        return labels + augmentation

    def finish_embedding(self, emb: Tensor, condition: Conditioning) -> Tensor:
        return silu(emb)

    def encode(self, x: Tensor, emb: Tensor, dropout_keys: Tensor | None) -> list[Tensor]:
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x) if name.endswith("conv") else layer(x, emb, dropout_keys)
                skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], emb: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = skips[-1]
        out: Tensor | None = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                y = layer(x)
            elif "aux_conv" in name:
                out = layer(y) if out is None else layer(y) + out
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb, dropout_keys)
        assert out is not None
        return out
