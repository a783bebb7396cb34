"""Adversarial training: GAN losses, the augmentation of what a discriminator sees, and its roles.

Logits [B,n] are positive for images that look real; losses [B] are means over n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
import torch.nn.functional as f
from msgspec import Meta
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.features.perceptual import make_discriminator, make_features
from edmdistill.methods.base import Role
from edmdistill.networks.flow import FlowNetwork


class GANLoss(NamedTuple):
    """discriminator: (real logits, fake logits) -> loss; generator: fake logits -> loss."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


HINGE = GANLoss(
    discriminator=lambda real, fake: (1 - real).relu().mean(1) + (1 + fake).relu().mean(1),
    generator=lambda fake: -fake.mean(1),
)
"""Source: Lim & Ye 2017, as in StyleGAN-XL and CTM's code."""

LOG = GANLoss(
    discriminator=lambda real, fake: f.softplus(-real).mean(1) + f.softplus(fake).mean(1),
    generator=lambda fake: -f.softplus(fake).mean(1),
)
"""-log d(x) - log(1 - d(g)) and log(1 - d(g)), d the sigmoid of the logits.  Source: CTM, section 3.3."""

GAN_LOSSES = {"hinge": HINGE, "log": LOG}

Augmentation = Literal["color", "translation", "cutout"]


class GANConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a method with an adversarial loss."""

    gan: Annotated[float, Meta(ge=0, description="weight of the adversarial loss; 0 = none")] = 1.0
    gan_loss: Annotated[Literal["hinge", "log"], Meta(description="the official code's or the paper's")] = "hinge"
    gan_warmup_images: Annotated[int, Meta(ge=0, description="images before the adversarial loss starts")] = 0
    gan_channels: Annotated[int, Meta(ge=1, le=100_000, description="channels of the mixed feature maps")] = 64
    features: Annotated[tuple[str, ...], Meta(description="TorchScript feature networks; none = random features")] = ()
    augment: Annotated[tuple[Augmentation, ...], Meta(description="augmentations of the discriminator's input")] = (
        "color",
        "translation",
        "cutout",
    )


def augment(x: Tensor, draws: Draws, augmentations: Sequence[Augmentation]) -> Tensor:
    """Returns x after these augmentations, drawn for each image; differentiable.  [B,C,H,W], data in [-1, 1]

    Source: Zhao et al. 2020 (DiffAugment), section 3.2.
    """
    for augmentation in augmentations:
        x = AUGMENTATIONS[augmentation](x, draws)
    return x


def color(x: Tensor, draws: Draws) -> Tensor:
    """Changes brightness by up to .5, saturation by a factor of 0 to 2 and contrast by a factor of .5 to 1.5."""
    brightness, saturation, contrast = draws.uniform(3).to(x)[:, :, None, None, None].unbind(1)
    x = x + brightness - 0.5
    gray = x.mean(1, keepdim=True)
    x = gray + 2 * saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def translation(x: Tensor, draws: Draws) -> Tensor:
    """Shifts by up to an eighth of the image in each direction, filling with 0."""
    for dim, u in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        max_shift = round(size / 8)
        shift = (u * (2 * max_shift + 1)).floor() - max_shift
        source = torch.arange(size, device=x.device) + shift[:, None]
        inside = ((source >= 0) & (source < size)).to(x.dtype)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        index = source.clamp(0, size - 1).long().reshape(shape).expand_as(x)
        x = x.gather(dim, index) * inside.reshape(shape)
    return x


def cutout(x: Tensor, draws: Draws) -> Tensor:
    """Sets a square of half the image's size, around a random pixel, to 0."""
    outside = torch.zeros_like(x[:, :1], dtype=torch.bool)
    for dim, u in zip((2, 3), draws.uniform(2).unbind(1), strict=True):
        size = x.shape[dim]
        side = size // 2
        first = (u * (size + 1 - side % 2)).floor() - side // 2
        offset = torch.arange(size, device=x.device) - first[:, None]
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        outside = outside | ((offset < 0) | (offset >= side)).reshape(shape)
    return x * outside.to(x.dtype)


AUGMENTATIONS: dict[Augmentation, Callable[[Tensor, Draws], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def gan_roles(config: GANConfig) -> dict[str, Role]:
    """Returns the roles of a projected discriminator: frozen features, and heads that are trained on them."""
    files, channels = config.features, config.gan_channels

    def features(flow: FlowNetwork, seed: int) -> nn.Module:
        like = torch.zeros(1, flow.img_channels, flow.img_resolution, flow.img_resolution)
        return make_features(files, like, channels, seed)

    def heads(flow: FlowNetwork, seed: int) -> nn.Module:
        return make_discriminator(max(1, len(files)), channels, seed)

    return {"features": Role(trained=False, make=features), "discriminator": Role(trained=True, make=heads)}


class Adversary:
    """The roles of `gan_roles` with a loss: images are augmented, embedded, and judged.

    Args:
        networks: by role.
    """

    def __init__(self, networks: Mapping[str, Any], config: GANConfig) -> None:
        self.features, self.discriminator = networks["features"], networks["discriminator"]
        self.loss, self.augmentations = GAN_LOSSES[config.gan_loss], config.augment

    def discriminator_loss(self, real: Tensor, fake: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the discriminator's loss [B] and its signals; real and fake [B,C,H,W] get no gradient."""
        with torch.no_grad():
            maps = self.features(torch.cat([augment(x, draws, self.augmentations) for x in (real, fake)]))
        # In one pass: a discriminator that is wrapped for several processes is called once a turn.
        real_logits, fake_logits = self.discriminator(maps).chunk(2)
        signals = {"logits_real": real_logits.detach().mean(), "logits_fake": fake_logits.detach().mean()}
        return self.loss.discriminator(real_logits, fake_logits), signals

    def generator_loss(self, fake: Tensor, draws: Draws) -> Tensor:
        """Returns the generator's loss, differentiable in fake [B,C,H,W].  [B]"""
        return self.loss.generator(self.discriminator(self.features(augment(fake, draws, self.augmentations))))
