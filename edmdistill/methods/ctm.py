"""CTM: consistency trajectory models, a generator that jumps from any time to any earlier one.

Kim et al. 2024 (ICLR), algorithm 4.

    G(x_t, t, s) = cos(t-s) x_t - sin(t-s) sigma_d F(x_t, t; s)    the jump; (s/t) x + (1 - s/t) g in EDM's scale
    G_sg                                                           the same with the target network, G's EMA
    x_u      = Solver(x_t, t, u)                                   along the teacher's trajectory, s <= u < t
    x_target = G_sg(G_sg(x_u, u, s), s, end)                       both are compared near the data, at sigma_min
    x_est    = G_sg(G(x_t, t, s), s, end)                          the gradient flows through G_sg
    L        = d(x_est, x_target) + lambda |F(x_t', t'; t') - v / sigma_d|^2 + lambda' GAN(x_est)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.defaults import refuse_idle
from edmdistill.draws import Draws
from edmdistill.methods.adversarial import GAN_OPTIONS, AdversarialTurns, GANConfig, Terms, gan_roles
from edmdistill.methods.base import Batch, EmaOf, FlowFunction, Method, NoiseRange, Role, SecondGain, Turn
from edmdistill.methods.distances import Distance, PerceptionFile, check_distance, distance_of, l2, perception_roles
from edmdistill.methods.gan_losses import GANWeight
from edmdistill.methods.noising import noised
from edmdistill.methods.solver import follow_flow
from edmdistill.schedules import ctm_indices, ctm_score_sigmas, edm_sigmas
from edmdistill.transfer import Constant
from edmdistill.trigflow import ddim_step, diffuse, sigma_to_time


class CTMConfig(GANConfig, frozen=True, forbid_unknown_fields=True):
    N: Annotated[int, Meta(ge=2, le=100_000, description="noise levels on EDM's curve")] = 18
    max_steps: Annotated[int, Meta(ge=1, le=100_000, description="largest number of the solver's Heun steps")] = 17
    sampling: Annotated[
        Literal["official", "paper"], Meta(description="distribution of t, s, u: official code's or paper's")
    ] = "official"
    matching: Annotated[
        Literal["soft", "local", "global"], Meta(description="the solver goes part of the way to s, one step, or all")
    ] = "soft"
    one_step_share: Annotated[float, Meta(ge=0, le=1, description="share of jumps from sigma_max to sigma_min")] = 0.1
    teacher: Annotated[bool, Meta(description="false: the solver follows the target network's own score")] = True
    mu: Annotated[float, Meta(ge=0, lt=1, description="EMA decay of the target network, per step")] = 0.999
    inner: Annotated[
        Literal["average", "live"], Meta(description="network of the jump from u to s: target or generator")
    ] = "average"
    distance: Distance = "pseudo-huber"
    lpips: PerceptionFile = ""
    dsm: Annotated[float, Meta(ge=0, description="weight of the denoising loss; 0 = none")] = 1.0
    dsm_weight: Annotated[
        Literal["edm", "none"], Meta(description="weighting of the denoising loss over noise levels")
    ] = "edm"
    gan: GANWeight = 1.0
    s_gain: SecondGain = 0.0

    def __post_init__(self) -> None:
        check_distance(self)
        if not self.gan:
            refuse_idle(self, GAN_OPTIONS, "gan = 0", "set gan above 0")
        if not self.dsm:
            refuse_idle(self, ("dsm_weight",), "dsm = 0", "set dsm above 0")
        if not self.gan and not self.dsm:
            refuse_idle(self, ("balance",), "gan = 0 and dsm = 0", "set one of them above 0")
        if self.matching == "global" and self.max_steps >= self.N - 1:  # then u = s
            refuse_idle(self, ("inner",), 'matching = "global"', 'set matching = "soft" or max_steps below N - 1')
        if self.matching == "local" and self.sampling == "paper":
            refuse_idle(self, ("max_steps",), 'matching = "local"', 'set matching = "soft" or "global"')


class Jump(NamedTuple):
    """A jump from x_t at t to s, and a time u between them: s <= u < t.

    Attributes:
        t, s, u: times.  [B]
        x_t: data with noise.  [B,C,H,W]
        start, stop: indices of t and u in the grid of times.  [B] int64
        steps: the solver's, from t to u.
    """

    t: Tensor
    s: Tensor
    u: Tensor
    x_t: Tensor
    start: Tensor
    stop: Tensor
    steps: int


class CTM(Method[CTMConfig]):
    Config = CTMConfig

    def __init__(self, config: CTMConfig, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.generator, self.target = networks["generator"], networks["target"]
        self.distance = distance_of(config, networks)
        times = sigma_to_time(edm_sigmas(config.N, noise.sigma_min, noise.sigma_max), noise.sigma_data)
        self.times, self.end = Constant(times), float(times[-1])

    @classmethod
    def roles_for(cls, config: CTMConfig) -> dict[str, Role]:
        """Differs: the official code reads s by random layers at full weight; ours are copies of t's, by s_gain."""
        roles = {"teacher": Role(trained=False)} if config.teacher else {}
        roles["generator"] = Role(trained=True, two_time=True, second_gain=config.s_gain)
        roles["target"] = roles["generator"]._replace(trained=False, ema_of=EmaOf("generator", config.mu))
        return roles | perception_roles(config.lpips) | gan_roles(config)

    def turns(self) -> tuple[Turn, ...]:
        return AdversarialTurns(self.terms, self.fake, self.networks, self.config, {"dsm": self.config.dsm}).turns()

    def terms(self, batch: Batch, draws: Draws, x_target: Tensor | None = None) -> Terms:
        """Algorithm 4, line 7.  x_target: where it is known already."""
        jump = self.draw_jump(batch, draws)
        x_target = self.x_target(jump, batch.labels) if x_target is None else x_target
        x_est = self.x_est(jump, batch.labels)
        losses = {"ctm": self.distance(x_est, x_target)}
        if self.config.dsm:
            losses["dsm"] = self.denoising_loss(batch, draws)
        return Terms(losses, jump.t, x_est, cached=x_target)

    def fake(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns x_est, which the discriminator tells from data, and t: algorithm 4, line 8."""
        jump = self.draw_jump(batch, draws)
        return self.x_est(jump, batch.labels), jump.t

    def draw_jump(self, batch: Batch, draws: Draws) -> Jump:
        """Algorithm 4, lines 2-5."""
        config, times = self.config, self.times.on(batch.x0.device)
        start, end, stop, steps = ctm_indices(
            draws,
            config.N,
            max_steps=config.max_steps,
            sampling=config.sampling,
            matching=config.matching,
            one_step_share=config.one_step_share,
        )
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, self.noise.sigma_data), times[start])
        return Jump(times[start], times[end], times[stop], x_t, start, stop, steps)

    def denoising_loss(self, batch: Batch, draws: Draws) -> Tensor:
        """Returns |D(x_t, t) - x0|^2 with EDM's weight, which makes it |F(x_t, t; t) - v / sigma_d|^2.  [B]

        A jump has no gradient at s = t, so this loss is what trains small jumps.
        Source: section 3.3.  Differs: the paper has no weight, as with dsm_weight = "none".
        """
        sigma_data, sigma_min, sigma_max = self.noise
        t = sigma_to_time(ctm_score_sigmas(draws, sigma_min, sigma_max), sigma_data)
        x_t, v = noised(batch.x0, t, draws, sigma_data)
        square = l2(self.generator(x_t, t, batch.labels, t), v / sigma_data)
        return square if self.config.dsm_weight == "edm" else square * (sigma_data * t.sin()).to(square) ** 2

    @torch.no_grad()
    def x_target(self, jump: Jump, labels: Tensor | None) -> Tensor:
        """Returns x_target: by the solver to u, by the target network to s and to the end.  Source: eq. 3."""

        def flow(x: Tensor, t: Tensor) -> Any:
            return self.networks["teacher"](x, t, labels) if self.config.teacher else self.target(x, t, labels, t)

        times = self.times.on(jump.x_t.device)
        x_u = follow_flow(flow, jump.x_t, times, jump.start, jump.stop, jump.steps, self.noise.sigma_data)
        inner = self.target if self.config.inner == "average" else self.generator
        return self.jump_to_end(self.jump(inner, x_u, jump.u, jump.s, labels), jump.s, labels)

    def x_est(self, jump: Jump, labels: Tensor | None) -> Tensor:
        """Returns x_est: by the generator to s, by the target network to the end."""
        return self.jump_to_end(self.jump(self.generator, jump.x_t, jump.t, jump.s, labels), jump.s, labels)

    def jump_to_end(self, x_s: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Returns G_sg(x_s, s, end).  Differs: the paper's end is 0; here it is the official code's, sigma_min."""
        return self.jump(self.target, x_s, s, torch.full_like(s, self.end), labels)

    def jump(self, network: FlowFunction, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Returns G(x_t, t, s)."""
        return ddim_step(x_t, network(x_t, t, labels, s), t, s, self.noise.sigma_data)


CTM.roles = CTM.roles_for(CTMConfig())
