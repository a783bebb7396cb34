"""ADM, the U-Net of guided diffusion, as EDM trains it.

Source: Dhariwal & Nichol 2021, section 3; Karras et al. 2022 (EDM), table 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from edmdistill.networks.arguments import Arg
from edmdistill.networks.base import Conditioning
from edmdistill.networks.embeddings import PositionalEmbedding, TimeEmbedding
from edmdistill.networks.initial import normal
from edmdistill.networks.levels import Layer, UNetLevels
from edmdistill.networks.unet_block import Conv2d, EDMUNet, GroupNormSiLU, Linear, UNetBlock


class DhariwalUNet(EDMUNet):
    """x [B,in_channels,H,W] -> F [B,out_channels,H,W].  All but the last nine arguments are the official class's.

    Attention has one head for every 64 channels; layers of fewer than 64 channels have none at any resolution.

    Args:
        label_dropout: fraction of labels that training sets to zero.
        double_norm: whether the blocks normalize their modulations; see ResidualBlock.
        split_times: see EDMUNet.
        adaptive_scale, group_channels: see UNetBlock. OpenAI's networks have groups of any size, and those for LSUN add
            the embedding.
    Raises: ValueError: double_norm without adaptive_scale.
    """

    def __init__(
        self,
        img_resolution: Arg.Resolution,
        in_channels: Arg.ImageChannels,
        out_channels: Arg.ImageChannels,
        label_dim: Arg.Classes = 0,
        augment_dim: Arg.OptionalChannels = 0,
        model_channels: Arg.Channels = 192,
        channel_mult: Arg.Multipliers = (1, 2, 3, 4),
        channel_mult_emb: Arg.Count = 4,
        num_blocks: Arg.Blocks = 3,
        attn_resolutions: Arg.Resolutions = (32, 16, 8),
        dropout: Arg.Dropout = 0.10,
        label_dropout: Arg.Fraction = 0.0,
        two_time: bool = False,
        logvar_channels: Arg.OptionalChannels = 0,
        logvar_heads: Arg.Count = 1,
        positional_time: bool = False,
        double_norm: bool = False,
        guided: bool = False,
        split_times: bool = False,
        adaptive_scale: bool = True,
        group_channels: Arg.Count = 4,
    ) -> None:
        super().__init__(locals(), in_channels)
        if double_norm and not adaptive_scale:
            raise ValueError("double_norm is for blocks that scale and shift: set adaptive_scale too")
        self.label_dropout = label_dropout
        self.emb_channels = emb_channels = model_channels * channel_mult_emb
        widths = [model_channels * mult for mult in channel_mult]
        levels = UNetLevels(img_resolution, widths[0], widths, num_blocks, attn_resolutions)

        def block(layer: Layer) -> UNetBlock:
            heads = layer.out_channels // 64 if layer.attention else 0
            return UNetBlock(
                layer.in_channels,
                layer.out_channels,
                emb_channels * (2 if split_times else 1),
                heads,
                layer.resample,
                dropout=dropout,
                adaptive_scale=adaptive_scale,
                double_norm=double_norm,
                group_channels=group_channels,
            )

        # Embedding.
        self.map_noise = (TimeEmbedding if positional_time else PositionalEmbedding)(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        # Encoder.
        encoder = [layer for layers in levels.encoder() for layer in layers]
        self.feature_layers = levels.last_layers()
        self.enc = nn.ModuleDict({encoder[0].name: Conv2d(in_channels, encoder[0].out_channels, 3)})
        for layer in encoder[1:]:
            self.enc[layer.name] = block(layer)

        # Decoder.
        decoder = [layer for layers in levels.decoder() for layer in layers]
        self.dec = nn.ModuleDict({layer.name: block(layer) for layer in decoder})
        cout = decoder[-1].out_channels
        self.out_norm = GroupNormSiLU(cout, eps=1e-5, least=group_channels)
        self.out_conv = Conv2d(cout, out_channels, 3)

        self.initialize()
        self.add_optional_layers()
        self.number_blocks()

    def initialize(self) -> None:
        """Initializes as torch does, but the last layer of a branch by zeros and the labels' with unit variance."""
        for name, layer in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            self.map_label.weight = nn.Parameter(normal(*self.map_label.weight.shape))

    def finish_embedding(self, emb: Tensor, condition: Conditioning) -> Tensor:
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(condition, emb))
        return silu(emb)

    def decode(self, skips: list[Tensor], emb: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = skips[-1]
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb, dropout_keys)
        out: Tensor = self.out_conv(self.out_norm(x))
        return out
