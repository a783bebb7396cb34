"""The levels of a U-Net: which layers it has, by the official names, and their channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer of an encoder or decoder.

    Attributes:
        resolution: of its output.
        role: conv (from the image), down, up, in0, in1 or blockN.
        attention: whether it attends.
    """

    resolution: int
    role: str
    in_channels: int
    out_channels: int
    attention: bool

    @property
    def name(self) -> str:
        return f"{self.resolution}x{self.resolution}_{self.role}"

    @property
    def resample(self) -> str:
        return self.role if self.role in ("down", "up") else "keep"


class UNetLevels(NamedTuple):
    """The plan of a U-Net.

    Attributes:
        img_resolution: of the first level; each level has half that of the one above.
        channels: of the first convolution.
        widths: channels of each level.
        num_blocks: of each level of the encoder; the decoder has one more.
        attn_resolutions: resolutions whose blocks attend.
    """

    img_resolution: int
    channels: int
    widths: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]

    def encoder(self) -> Iterator[list[Layer]]:
        """Yields the layers of each level, from the image on: its entrance, then its blocks."""
        channels = self.channels
        for level, width in enumerate(self.widths):
            resolution = self.img_resolution >> level
            layers = [Layer(resolution, "down" if level else "conv", channels, channels, False)]
            for index in range(self.num_blocks):
                attention = resolution in self.attn_resolutions
                layers.append(Layer(resolution, f"block{index}", channels, width, attention))
                channels = width
            yield layers

    def last_layers(self) -> list[Layer]:
        """Returns the encoder's last layer of each level; the last of all is the bottleneck."""
        return [layers[-1] for layers in self.encoder()]

    def decoder(self, attend_last: bool = False) -> Iterator[list[Layer]]:
        """Yields the layers of each level, from the lowest resolution on.

        Every block also takes the output of an encoder layer, from the last to the first.

        Args:
            attend_last: only the last block of a level attends.
        """
        skips = [layer.out_channels for layers in self.encoder() for layer in layers]
        channels, lowest = skips[-1], len(self.widths) - 1
        for level, width in reversed(list(enumerate(self.widths))):
            resolution = self.img_resolution >> level
            layers = [Layer(resolution, "up", channels, channels, False)]
            if level == lowest:
                entrance = Layer(resolution, "in0", channels, channels, True)
                layers = [entrance, Layer(resolution, "in1", channels, channels, False)]
            for index in range(self.num_blocks + 1):
                attention = resolution in self.attn_resolutions and (index == self.num_blocks or not attend_last)
                layers.append(Layer(resolution, f"block{index}", channels + skips.pop(), width, attention))
                channels = width
            yield layers
