"""Adversarial training: the options, the roles and the turns of a discriminator, for any method that makes images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.features.perceptual import make_discriminator, make_features
from edmdistill.methods.base import Batch, Loss, Preview, Role, Turn, WatchedFunction
from edmdistill.methods.diff_augment import Augmentation, augment
from edmdistill.methods.gan_losses import GAN_LOSSES, GANWeight, gan_signals
from edmdistill.methods.weighting import Balance, balanced_sum
from edmdistill.networks.flow import FlowNetwork


class GANConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a method whose generator may have an adversarial loss."""

    gan: GANWeight = 0.0
    gan_loss: Annotated[
        Literal["hinge", "log", "non-saturating", "relativistic"], Meta(description="form of the adversarial loss")
    ] = "hinge"
    gan_penalty: Annotated[float, Meta(ge=0)] | None = None
    """Weight gamma of the discriminator's gradient penalty, gamma/2 (R1 + R2); default: 1 for relativistic, else 0."""
    gan_warmup_images: Annotated[int, Meta(ge=0, description="images before the adversarial loss starts")] = 0
    gan_channels: Annotated[int, Meta(ge=1, le=100_000, description="channels of the mixed feature maps")] = 64
    features: Annotated[tuple[str, ...], Meta(description="TorchScript feature networks; none = random features")] = ()
    gan_augment: Annotated[tuple[Augmentation, ...], Meta(description="augmentations of the discriminator's input")] = (
        "color",
        "translation",
        "cutout",
    )
    balance: Balance = "adaptive"

    def __post_init__(self) -> None:
        if not self.gan:
            refuse_idle(self, (*GAN_OPTIONS, "balance"), "gan = 0", "set gan above 0")


GAN_OPTIONS = "gan_loss", "gan_penalty", "gan_warmup_images", "gan_channels", "features", "gan_augment"
"""What an adversary alone reads."""


def gan_roles(config: GANConfig) -> dict[str, Role]:
    """Returns the roles of a projected discriminator, frozen features and heads that are trained; none if gan = 0."""
    if not config.gan:
        return {}
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
        self.loss, self.augmentations = GAN_LOSSES[config.gan_loss], config.gan_augment
        self.penalty = self.loss.penalty if config.gan_penalty is None else config.gan_penalty

    def discriminator_loss(self, real: Tensor, fake: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the discriminator's loss [B] and its signals; real and fake [B,C,H,W] get no gradient.

        The penalty is gamma/2 (|dD(x)/dx|^2 + |dD(g)/dg|^2), D the mean logit.  Source: R3GAN, eq. of R1 and R2.
        """
        images = [image.detach().requires_grad_(self.penalty > 0) for image in (real, fake)]
        with torch.set_grad_enabled(self.penalty > 0):
            maps = self.features(torch.cat([augment(image, draws, self.augmentations) for image in images]))
        # In one pass: a discriminator that is wrapped for several processes is called once a turn.
        logits = self.discriminator(maps)
        real_logits, fake_logits = logits.chunk(2)
        value = self.loss.discriminator(real_logits, fake_logits)
        signals = gan_signals(real_logits, fake_logits, self.loss.relative)
        if self.penalty:
            slopes = torch.autograd.grad(logits.mean(1).sum(), images, create_graph=True)
            squares = torch.stack([slope.square().flatten(1).sum(1) for slope in slopes]).sum(0)
            value, signals = value + self.penalty / 2 * squares, signals | {"gan_slopes": squares.detach().mean()}
        return value, signals

    def generator_loss(self, real: Tensor, fake: Tensor, draws: Draws) -> Tensor:
        """Returns the generator's loss, differentiable in fake; real is its pair.  [B,C,H,W] each -> [B]"""
        images = [fake, real] if self.loss.relative else [fake]
        maps = self.features(torch.cat([augment(image, draws, self.augmentations) for image in images]))
        logits, *others = self.discriminator(maps).split(len(fake))
        return self.loss.generator(logits - others[0] if others else logits)


class Terms(NamedTuple):
    """The terms of a generator's loss.

    Attributes:
        losses: by name, the reference first.  [B] each
        t: time of each sample.  [B]
        generated: images to be judged, with gradient; None: `fake` makes others.  [B,C,H,W]
        signals: as of Loss.
        cached: what the same terms need not compute again.
    """

    losses: dict[str, Tensor]
    t: Tensor
    generated: Tensor | None
    signals: dict[str, Tensor] = {}
    cached: Any = None


class AdversarialTurns:
    """The turns of a generator whose loss is a sum of terms, an adversarial one among them if gan > 0.

    Args:
        terms: (batch, draws, cached) -> Terms.
        fake: (batch, draws) -> images of the generator, to be told from batch.x0, and their times.  [B,C,H,W], [B]
        networks: by role.
        weights: of the terms, by name; default: 1.
        begins: images before the adversary's first turn, where they are more than gan_warmup_images.
    Source: Kim et al. 2024 (CTM), section 3.3 and algorithm 4, lines 7-8.
    """

    def __init__(
        self,
        terms: Callable[[Batch, Draws, Any], Terms],
        fake: Callable[[Batch, Draws], tuple[Tensor, Tensor]],
        networks: Mapping[str, Any],
        config: GANConfig,
        weights: Mapping[str, float] = {},
        begins: int = 0,
    ) -> None:
        self.method_terms, self.fake, self.config = terms, fake, config
        self.begins = max(config.gan_warmup_images, begins)
        self.generator: WatchedFunction = networks["generator"]
        self.adversary = Adversary(networks, config) if config.gan else None
        self.weights = {"gan": config.gan, **weights}

    def turns(self) -> tuple[Turn, ...]:
        balanced = self.config.balance == "adaptive" and any(self.weights.values())
        preview = self.last_layer_gradients if balanced else None
        generator = Turn("generator", self.generator_loss, preview)
        if self.adversary is None:
            return (generator,)
        return Turn("discriminator", self.discriminator_loss, begins=self.begins), generator

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the discriminator's loss: data against generated images."""
        assert self.adversary is not None
        with torch.no_grad():
            fake, t = self.fake(batch, draws)
        value, signals = self.adversary.discriminator_loss(batch.x0, fake, draws)
        return Loss(value, t, signals)

    def last_layer_gradients(self, batch: Batch, draws: Draws) -> Preview:
        """Returns the gradient of each term in the generator's last layer."""
        with self.generator.watch() as last:
            terms = self.terms(batch, draws)
        return Preview({name: last.gradient(loss.mean()) for name, loss in terms.losses.items()}, terms.cached)

    def generator_loss(self, batch: Batch, draws: Draws, preview: Preview | None = None) -> Loss:
        """Returns the weighted sum of the terms."""
        terms = self.terms(batch, draws, None if preview is None else preview.cached)
        value, signals = balanced_sum(terms.losses, self.weights, None if preview is None else preview.means)
        generated = None if terms.generated is None else terms.generated.detach()
        return Loss(value, terms.t, terms.signals | signals, generated)

    def terms(self, batch: Batch, draws: Draws, cached: Any = None) -> Terms:
        """Returns the terms, the adversarial one last."""
        terms = self.method_terms(batch, draws, cached)
        if self.adversary is None or batch.images < self.begins:
            return terms
        fake = self.fake(batch, draws)[0] if terms.generated is None else terms.generated
        loss = self.adversary.generator_loss(batch.x0, fake, draws)
        return terms._replace(losses=terms.losses | {"gan": loss}, generated=fake)


def adversarial_turns(
    loss: Callable[[Batch, Draws], Loss],
    fake: Callable[[Batch, Draws], tuple[Tensor, Tensor]],
    networks: Mapping[str, Any],
    config: GANConfig,
    begins: int = 0,
) -> tuple[Turn, ...]:
    """Returns the turns of a generator with a single loss of its own, and of its discriminator if gan > 0.

    Images that `loss` returns with gradient are judged; otherwise `fake` makes them. The arguments are those of
    AdversarialTurns.
    """
    if not config.gan:
        return (Turn("generator", loss),)

    def terms(batch: Batch, draws: Draws, cached: Any) -> Terms:
        value, t, signals, generated = loss(batch, draws)
        judged = generated if generated is not None and generated.requires_grad else None
        return Terms({"distillation": value}, t, judged, signals)

    return AdversarialTurns(terms, fake, networks, config, begins=begins).turns()
