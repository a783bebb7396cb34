"""Score distillation: a generator learns from the gap between the teacher and an auxiliary score that tracks it.

`ScoreDistillation` is the frame of CoSIM, SiD and aVSD. `VariationalMethod` has the two losses of adaptive variational
score distillation (aVSD), used by vsd and scd. A generated image g is diffused to x_t = cos(t) g + sin(t) z, where
sigma_d F* is the velocity of the data and sigma_d F_phi that of generated images. Their gap is the gradient of a
divergence between q_t and p_t, the distributions of x_t for the generator and for the data:

    d KL(q_t || p_t) / d theta = E[ cos(t)^2 / (sigma_d sin(t)) (F* - F_phi) . d g / d theta ]

Source: Wang et al. 2023 (VSD); Yin et al. 2024 (DMD); Lu & Song 2025 (sCM), appendix C.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn, with_inputs
from edmdistill.methods.guidance import GuidanceConfig, GuidedMethod
from edmdistill.methods.noising import initial_noise, noised, one_step
from edmdistill.methods.weighting import adaptive, mean_rms
from edmdistill.schedules import lognormal_times
from edmdistill.trigflow import denoised, diffuse

AuxiliaryTurns = Annotated[
    int, Meta(ge=1, le=1000, description="turns of the auxiliary score for each of the generator's")
]
ScoreMean = Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma) where the two scores are compared")]
ScoreStd = Annotated[
    float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) where the two scores are compared")
]
AuxiliaryMean = Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma) in the auxiliary score's turn")]
AuxiliaryStd = Annotated[
    float, Meta(gt=0, le=20, description="standard deviation of ln(sigma) in the auxiliary score's turn")
]


class ScoreConfig(Protocol):
    """The options of every method of the kind."""

    @property
    def auxiliary_turns(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=ScoreConfig)


SCORES = {"teacher": Role(trained=False), "generator": Role(trained=True), "auxiliary": Role(trained=True)}
"""The roles of one time."""


class ScoreDistillation(Method[ConfigT]):
    """A method that alternates between an auxiliary score, which tracks the generator, and the generator."""

    teacher: Any  # guided, in aVSD

    def __init__(self, config: ConfigT, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.teacher, self.generator, self.auxiliary = (
            networks[role] for role in ("teacher", "generator", "auxiliary")
        )

    def turns(self) -> tuple[Turn, ...]:
        auxiliary = (Turn("auxiliary", self.auxiliary_loss),)
        return *auxiliary * self.config.auxiliary_turns, *self.generator_turns()

    def generator_turns(self) -> tuple[Turn, ...]:
        """Returns the turns of the generator, and of its adversary if there is one."""
        return (Turn("generator", self.generator_loss),)

    @abstractmethod
    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss: ...

    @abstractmethod
    def generator_loss(self, batch: Batch, draws: Draws) -> Loss: ...


class VSDOptions(GuidanceConfig, Protocol):
    """The options of every method with aVSD's losses."""

    @property
    def vsd_P_mean(self) -> float: ...

    @property
    def vsd_P_std(self) -> float: ...

    @property
    def aux_P_mean(self) -> float: ...

    @property
    def aux_P_std(self) -> float: ...


VSDOptionsT = TypeVar("VSDOptionsT", bound=VSDOptions)


class VariationalMethod(GuidedMethod[VSDOptionsT]):
    """A method with aVSD's two losses, of a guided teacher: all of vsd, a part of scd."""

    def auxiliary_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L_Diff(phi) = e^-u / D |F_phi(x_t, t) - v / sigma_d|^2 + u: diffusion training on generated images.

        Source: sCM, appendix C.2, which leaves the weighting open; this one is appendix D's.
        """
        config, (sigma_data, _, sigma_max) = self.config, self.noise
        t = lognormal_times(draws, sigma_data, P_mean=config.aux_P_mean, P_std=config.aux_P_std)
        auxiliary, generator, _ = self.guided(draws)
        with torch.no_grad():
            g, _ = one_step(generator, batch, sigma_max, draws, sigma_data)
        x_t, v = noised(g, t, draws, sigma_data)
        F, u = auxiliary(x_t, t, batch.labels, u_at=(t,))
        error = F - v / sigma_data
        return Loss(adaptive(error, u), t, {"velocity_error": error.detach().square().mean()})

    def vsd_loss(self, batch: Batch, draws: Draws, logvars: int = 1) -> Loss:
        """Returns L_VSD(theta, psi) = e^-u / D |g - g^- + F* - F_phi|^2 + u: the generator follows the score gap.

        Its gradient in g is 2 e^-u / D (F* - F_phi). As in the paper, g is in units of the data, while F has unit
        variance: in equal units it would be 1 / sigma_d of this, which matters where another loss is added.

        Args:
            logvars: number of the generator's log-variance heads; the last one is this loss's.
        Source: sCM, appendix C.2; e^-u replaces KL's weighting over t.
        """
        config, (sigma_data, _, sigma_max) = self.config, self.noise
        t = lognormal_times(draws, sigma_data, P_mean=config.vsd_P_mean, P_std=config.vsd_P_std)
        auxiliary, generator, teacher = self.guided(draws)
        x, start = initial_noise(batch.x0, sigma_max, draws, sigma_data)
        F, *_, u = generator(x, start, batch.labels, u_at=(t,) * logvars)
        g = denoised(x, F, start, sigma_data)
        with torch.no_grad():
            x_t = diffuse(g, draws.normal_like(g, sigma_data), t)
            gap = teacher(x_t, t, batch.labels) - auxiliary(x_t, t, batch.labels)
        return Loss(adaptive(g - g.detach() + gap, u), t, {"score_gap": mean_rms(gap)}, g.detach())

    def guided(self, draws: Draws) -> tuple[FlowFunction, FlowFunction, Callable[..., Tensor]]:
        """Draws the guidance weight of each sample, and returns auxiliary score, generator and teacher at it."""
        w = self.teacher.weights(draws)
        auxiliary, generator = (with_inputs(self.networks[role], w=w) for role in ("auxiliary", "generator"))
        return auxiliary, generator, partial(self.teacher, w=w)
