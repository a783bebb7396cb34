"""Frozen feature networks for GAN discriminators, the discriminator, and perceptual distances.

Source: Sauer et al. 2021 (Projected GANs), section 3.2, for the mixing; Kim et al. 2024 (CTM), appendix D.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from edmdistill.errors import TrainingError, counted
from edmdistill.features.base import to_rgb
from edmdistill.features.script import ScriptFile
from edmdistill.torch_state import seeded

NUM_MAPS = 4
"""Number of feature maps that a network returns, the finest first."""
INPUT_SIZE = 224
"""Resolution at which TorchScript files get images, as ImageNet classifiers do."""
IN_A_RECIPE = "remove it from the recipe"


def resize(x: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Resizes bilinearly.  [B,C,H,W] -> [B,C,size,size]"""
    return f.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


class PerceptualDistance(ScriptFile):
    """A learned distance, such as LPIPS: a TorchScript file (a, b) -> [B] or [B,1,1,1], of RGB images in [0, 1].

    Images below 256 pixels are resized to 224 first.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distance between a and b.  [B,C,H,W] in [-1, 1] -> [B]"""

        def prepared(x: Tensor) -> Tensor:
            x = (to_rgb(x, self.path, IN_A_RECIPE) + 1) / 2
            return resize(x) if x.shape[-1] < 256 else x

        distance = self.run(prepared(a), prepared(b))
        if not isinstance(distance, Tensor) or distance.numel() != len(a):
            raise TrainingError(
                f"{self.path} must return a distance for each of {len(a)} pairs of images, as [B] or [B,1,1,1]: give "
                "one that does"
            )
        return distance.reshape(len(a))


class ScriptFeatures(ScriptFile):
    """A TorchScript file: RGB images [B,3,224,224] in [-1, 1] -> a list of NUM_MAPS feature maps, the finest first."""

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.run(resize(to_rgb(x, self.path, IN_A_RECIPE)))
        if not isinstance(maps, list | tuple) or len(maps) != NUM_MAPS:
            given = counted(len(maps), "feature map") if isinstance(maps, list | tuple) else "no list of feature maps"
            raise TrainingError(
                f"{self.path} gives {given}, but {NUM_MAPS} are needed, finest first: give one that has them"
            )
        return list(maps)


class RandomFeatures(nn.Module):
    """A pyramid of random convolutions, for use without a pretrained network; each map has twice the channels of the
    finer one.
    """

    def __init__(self, img_channels: int) -> None:
        super().__init__()
        widths = [img_channels, *(16 << level for level in range(NUM_MAPS))]
        self.levels = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        for layer in self.levels:
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.normal_(layer.bias, std=0.3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level, layer in enumerate(self.levels):
            if level and x.shape[-1] > 1:
                x = f.avg_pool2d(x, 2)
            x = f.leaky_relu(layer(x), 0.2)
            maps.append(x)
        return maps


class ProjectedFeatures(nn.Module):
    """Feature maps mixed by frozen random 1x1 and 3x3 convolutions, across channels and from coarse to fine.

    A discriminator of the features themselves would use only a few of them.

    Args:
        networks: images -> NUM_MAPS maps each.
        like: an example image, from which the numbers of channels follow.  [1,C,H,W]
        channels: of every map that is returned.
    """

    def __init__(self, networks: Sequence[nn.Module], like: Tensor, channels: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks).eval()
        with torch.no_grad():
            widths = [[features.shape[1] for features in network(like)] for network in networks]
        self.across = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, channels, 1, bias=False) for width in levels) for levels in widths
        )
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in levels) for levels in widths
        )
        for layer in (*self.across.modules(), *self.scales.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns all maps of all networks.  [B,C,H,W] -> NUM_MAPS [B,channels,h,w] for each network"""
        mixed: list[Tensor] = []
        for network, across, scales in zip(self.networks, self.across, self.scales, strict=True):
            coarser: Tensor | None = None
            levels = []
            for features, channel, scale in reversed(list(zip(network(x), across, scales, strict=True))):  # type: ignore[call-overload]
                y = channel(features)
                if coarser is not None:
                    up = f.interpolate(coarser, size=y.shape[-2:], mode="bilinear", align_corners=False)
                    y = (y + up) * 0.5**0.5
                coarser = scale(y)
                levels.append(coarser)
            mixed += reversed(levels)
        return mixed


class MultiScaleDiscriminator(nn.Module):
    """A discriminator with a head for each feature map, which returns a logit at every pixel of the map.

    There is no batch normalization: the logits of an image depend on that image alone.
    """

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(1, channels),
                nn.LeakyReLU(0.2),
                nn.Conv2d(channels, 1, 1),
            )
            for _ in range(count)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns logits, above 0 for real.  maps of ProjectedFeatures -> [B, pixels of all maps]"""
        return torch.cat([head(features).flatten(1) for head, features in zip(self.heads, maps, strict=True)], 1)


def make_features(files: Sequence[str], like: Tensor, channels: int, seed: int) -> ProjectedFeatures:
    """Returns projected features of the files, or of random networks if there are none; the seed draws all weights."""
    with seeded(seed):
        networks: list[nn.Module] = [ScriptFeatures(file) for file in files]
        networks = networks or [RandomFeatures(like.shape[1])]
        return ProjectedFeatures(networks, like, channels)


def make_discriminator(networks: int, channels: int, seed: int) -> MultiScaleDiscriminator:
    """Returns a discriminator of the projected features of so many networks."""
    with seeded(seed):
        return MultiScaleDiscriminator(networks * NUM_MAPS, channels)
