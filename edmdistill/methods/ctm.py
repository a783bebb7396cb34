"""CTM: consistency trajectory models, a generator that jumps from any time to any earlier one.

Kim et al. 2024 (ICLR), algorithm 4.

    G(x_t, t, s) = cos(t-s) x_t - sin(t-s) sigma_d F(x_t, t; s)    the jump: (s/t) x + (1 - s/t) g in EDM's scale
    G_sg                                                          the same by the generator's moving average
    x_u      = Solver(x_t, t, u)                                  the teacher's way, s <= u < t
    x_target = G_sg(G_sg(x_u, u, s), s, end)                      both ways end near the data, at sigma_min
    x_est    = G_sg(G(x_t, t, s), s, end)                         the gradient flows through the average
    L        = d(x_est, x_target) + lambda |F(x_t', t'; t') - v / sigma_d|^2 + lambda' GAN(x_est)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.features.perceptual import Perception, make_features, make_heads
from edmdistill.methods.adversarial import GANS, Change, augment
from edmdistill.methods.base import (
    Batch,
    EmaOf,
    FlowFunction,
    Loss,
    Method,
    NoiseRange,
    Preview,
    Role,
    Turn,
    WatchedFunction,
)
from edmdistill.methods.distances import DISTANCES
from edmdistill.methods.solver import follow_flow
from edmdistill.networks.flow import FlowNetwork
from edmdistill.schedules import ctm_indices, ctm_score_sigmas, edm_sigmas
from edmdistill.trigflow import ddim_step, diffuse, sigma_to_time, velocity


class CTMConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    N: Annotated[int, Meta(ge=2, le=100_000, description="noise levels, on EDM's curve")] = 18
    max_steps: Annotated[
        int, Meta(ge=1, le=100_000, description="most steps of the teacher, of two evaluations each")
    ] = 17
    sampling: Annotated[
        Literal["official", "paper"], Meta(description="law of t, s and u: the official code's or the paper's")
    ] = "official"
    matching: Annotated[
        Literal["soft", "local", "global"], Meta(description="the teacher leads part of the way, one step, all the way")
    ] = "soft"
    one_step_share: Annotated[float, Meta(ge=0, le=1, description="share of jumps from sigma_max to sigma_min")] = 0.1
    teacher: Annotated[bool, Meta(description="false: the way is led by the average's own score")] = True
    mu: Annotated[float, Meta(ge=0, lt=1, description="decay of the average that the target is made by, a step")] = (
        0.999
    )
    inner: Annotated[
        Literal["average", "live"], Meta(description="who jumps from u to s: the average, or the generator as it is")
    ] = "average"
    distance: Annotated[Literal["pseudo-huber", "l2", "lpips"], Meta(description="between x_est and x_target")] = (
        "pseudo-huber"
    )
    lpips: Annotated[str, Meta(description="TorchScript file of the distance lpips; see Perception")] = ""
    dsm: Annotated[float, Meta(ge=0, description="weight of the denoising loss; 0 = none")] = 1.0
    dsm_weight: Annotated[
        Literal["edm", "none"], Meta(description="of noise levels in the denoising loss: EDM's, or 1 for x0")
    ] = "edm"
    gan: Annotated[float, Meta(ge=0, description="weight of the adversarial loss; 0 = none")] = 1.0
    gan_loss: Annotated[Literal["hinge", "log"], Meta(description="the official code's or the paper's")] = "hinge"
    gan_warmup_images: Annotated[int, Meta(ge=0, description="images before the adversarial loss begins")] = 0
    gan_channels: Annotated[int, Meta(ge=1, le=100_000, description="of the mixed feature maps")] = 64
    features: Annotated[
        tuple[str, ...], Meta(description="TorchScript files of feature maps, see ScriptFeatures; none = random ones")
    ] = ()
    augment: Annotated[tuple[Change, ...], Meta(description="what the discriminator does not see")] = (
        "color",
        "translation",
        "cutout",
    )
    balance: Annotated[
        Literal["adaptive", "fixed"], Meta(description="adaptive: losses of equal gradients in the last layer")
    ] = "adaptive"

    def __post_init__(self) -> None:
        if (self.distance == "lpips") != bool(self.lpips):
            raise ValueError('distance = "lpips" and lpips = FILE go together: give both or neither')


def ctm_roles(config: CTMConfig) -> dict[str, Role]:
    """The roles that play under these options."""

    def features(flow: FlowNetwork, seed: int) -> nn.Module:
        like = torch.zeros(1, flow.img_channels, flow.img_resolution, flow.img_resolution)
        return make_features(config.features, like, config.gan_channels, seed)

    def heads(flow: FlowNetwork, seed: int) -> nn.Module:
        return make_heads(max(1, len(config.features)), config.gan_channels, seed)

    roles = {"teacher": Role(trained=False)} if config.teacher else {}
    roles["generator"] = Role(trained=True, two_time=True)
    roles["target"] = Role(trained=False, two_time=True, ema_of=EmaOf("generator", config.mu))
    if config.lpips:
        roles["perception"] = Role(trained=False, make=lambda flow, seed: Perception(config.lpips))
    if config.gan:
        roles["features"] = Role(trained=False, make=features)
        roles["discriminator"] = Role(trained=True, make=heads)
    return roles


class Jump(NamedTuple):
    """A draw of algorithm 4, lines 2-5: indices of t, s, u in the grid, the teacher's steps to u, and x_t."""

    t: Tensor
    s: Tensor
    u: Tensor
    steps: int
    x_t: Tensor


class Parts(NamedTuple):
    """The losses by name, each [B]; the time of each sample; and where the two ways end."""

    losses: dict[str, Tensor]
    t: Tensor
    x_est: Tensor
    x_target: Tensor


class CTM(Method):
    Config = CTMConfig
    roles = ctm_roles(CTMConfig())

    @classmethod
    def roles_for(cls, config: msgspec.Struct) -> dict[str, Role]:
        return ctm_roles(cast(CTMConfig, config))

    def __init__(self, config: msgspec.Struct, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        self.config = own = cast(CTMConfig, config)
        self.noise = noise
        self.networks = networks
        self.generator: WatchedFunction = networks["generator"]
        self.target: FlowFunction = networks["target"]
        self.distance = networks["perception"] if own.lpips else DISTANCES[own.distance]
        sigma_data, sigma_min, sigma_max = noise
        self.times = sigma_to_time(edm_sigmas(own.N, sigma_min, sigma_max), sigma_data)

    def turns(self) -> tuple[Turn, ...]:
        preview = self.gradients if self.config.balance == "adaptive" else None
        generator = Turn("generator", self.generator_loss, preview)
        if not self.config.gan:
            return (generator,)
        return Turn("discriminator", self.discriminator_loss, begins=self.config.gan_warmup_images), generator

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Algorithm 4, line 8: data against x_est."""
        with torch.no_grad():
            jump = self.draw(batch, draws)
            fake = self.estimate(jump, batch.labels)
            seen = [augment(x, draws, self.config.augment) for x in (batch.x0, fake)]
            maps = self.networks["features"](torch.cat(seen))
        # In one pass: a discriminator that is wrapped for several processes is called once a turn.
        real_logits, fake_logits = self.networks["discriminator"](maps).chunk(2)
        signals = {"logits_real": real_logits.detach().mean(), "logits_fake": fake_logits.detach().mean()}
        value = GANS[self.config.gan_loss].discriminator(real_logits, fake_logits)
        return Loss(value, self.at(jump.t), signals)

    def gradients(self, batch: Batch, draws: Draws) -> Preview:
        """The gradient of each loss in the generator's last layer.  Source: section 3.3."""
        with self.generator.watch() as last:
            parts = self.parts(batch, draws)
        return Preview({name: last.gradient(loss.mean()) for name, loss in parts.losses.items()}, parts.x_target)

    def generator_loss(self, batch: Batch, draws: Draws, preview: Preview | None = None) -> Loss:
        """Algorithm 4, line 7."""
        parts = self.parts(batch, draws, None if preview is None else preview.kept)
        weights = {"ctm": 1.0, "dsm": self.config.dsm, "gan": self.config.gan}
        value = torch.zeros_like(parts.losses["ctm"])
        signals: dict[str, Tensor] = {}
        for name, loss in parts.losses.items():
            weight = weights[name] * (torch.ones_like(value[0]) if preview is None else balance(preview.means, name))
            value = value + weight * loss
            signals |= {name: loss.detach().mean()} | ({} if name == "ctm" else {f"lambda_{name}": weight})
        return Loss(value, parts.t, signals, parts.x_est.detach())

    def parts(self, batch: Batch, draws: Draws, x_target: Tensor | None = None) -> Parts:
        """All that the generator's loss is made of.  x_target: where it is known already."""
        jump = self.draw(batch, draws)
        if x_target is None:
            x_target = self.aim(jump, batch.labels)
        x_est = self.estimate(jump, batch.labels)
        losses = {"ctm": self.distance(x_est, x_target)}
        if self.config.dsm:
            losses["dsm"] = self.score_loss(batch, draws)
        if self.config.gan and batch.images >= self.config.gan_warmup_images:
            maps = self.networks["features"](augment(x_est, draws, self.config.augment))
            losses["gan"] = GANS[self.config.gan_loss].generator(self.networks["discriminator"](maps))
        return Parts(losses, self.at(jump.t), x_est, x_target)

    def draw(self, batch: Batch, draws: Draws) -> Jump:
        """Algorithm 4, lines 2-5."""
        own = self.config
        t, s, u, steps = ctm_indices(
            draws,
            own.N,
            most=own.max_steps,
            sampling=own.sampling,
            matching=own.matching,
            one_step_share=own.one_step_share,
        )
        return Jump(t, s, u, steps, diffuse(batch.x0, draws.normal_like(batch.x0, self.noise.sigma_data), self.at(t)))

    @torch.no_grad()
    def aim(self, jump: Jump, labels: Tensor | None) -> Tensor:
        """x_target: by the teacher to u, by the average to s and to the end.  Source: eq. 3."""

        def score(x: Tensor, t: Tensor) -> Tensor:
            return teacher(x, t, labels) if self.config.teacher else self.target(x, t, labels, t)

        teacher: FlowFunction = self.networks.get("teacher", self.target)
        times = self.times.to(jump.x_t.device)
        x_u = follow_flow(score, jump.x_t, times, jump.t, jump.u, jump.steps, self.noise.sigma_data)
        inner = self.target if self.config.inner == "average" else self.generator
        x_s = self.jump(inner, x_u, self.at(jump.u), self.at(jump.s), labels)
        return self.transport(x_s, jump.s, labels)

    def estimate(self, jump: Jump, labels: Tensor | None) -> Tensor:
        """x_est: by the generator to s, by the average to the end."""
        x_s = self.jump(self.generator, jump.x_t, self.at(jump.t), self.at(jump.s), labels)
        return self.transport(x_s, jump.s, labels)

    def transport(self, x_s: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """By the average from s to sigma_min; its weights are frozen, but a gradient flows through to x_s.

        Differs: the paper goes to 0, the official code to sigma_min, as here.
        """
        return self.jump(self.target, x_s, self.at(s), self.at(torch.full_like(s, self.config.N - 1)), labels)

    def score_loss(self, batch: Batch, draws: Draws) -> Tensor:
        """|D(x_t', t') - x0|^2 with EDM's weight, which makes it |F - v / sigma_d|^2.  [B]

        G itself has no gradient at s = t, so this is what teaches small jumps.  Source: section 3.3.
        Differs: the paper writes it without the weight, as dsm_weight = "none" has it.
        """
        sigma_data, sigma_min, sigma_max = self.noise
        t = sigma_to_time(ctm_score_sigmas(draws, sigma_min, sigma_max), sigma_data)
        z = draws.normal_like(batch.x0, sigma_data)
        F = self.generator(diffuse(batch.x0, z, t), t, batch.labels, t)
        square = (F - velocity(batch.x0, z, t) / sigma_data).square().flatten(1).mean(1)
        return square if self.config.dsm_weight == "edm" else square * (sigma_data * t.sin()).to(square) ** 2

    def at(self, index: Tensor) -> Tensor:
        """The times of points of the grid."""
        return self.times.to(index.device)[index]

    def jump(self, network: FlowFunction, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """G(x_t, t, s)."""
        return ddim_step(x_t, network(x_t, t, labels, s), t, s, self.noise.sigma_data)


def balance(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    """lambda = |gradient of ctm| / (|own gradient| + 1e-4), up to 1e4, and for gan from .01 to 10; 1 for ctm.  0-dim

    Source: section 3.3; the bounds are the official code's.
    """
    own, ctm = gradients[name].norm(), gradients["ctm"].norm()
    if name == "ctm":
        return torch.ones_like(own)
    weight: Tensor = (ctm / (own + 1e-4)).clamp(0, 1e4)
    return weight.clamp(0.01, 10) if name == "gan" else weight
