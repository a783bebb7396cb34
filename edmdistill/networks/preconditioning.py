"""Preconditioning: the coefficients between a raw network and its two views, by the family of the teacher.

EDM's view is D(x; sigma) = c_skip x + c_out F_raw(c_in x, c_noise); TrigFlow's is F(x_t, t), x_t = cos(t) x and
D = cos(t) x_t - sin(t) sigma_data F. Solved for F, which avoids the cancellation of a detour through D:

    F = a x_t + b F_raw(c x_t, c_noise)

Source: Karras et al. 2022 (EDM), table 1; Lu & Song 2025 (sCM), appendix B.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.errors import TrainingError
from edmdistill.networks.arguments import validated
from edmdistill.transfer import Constant

Sigma = Annotated[float, Meta(ge=1e-9, le=1e9)]
Coefficients = tuple[Tensor | float, Tensor | float, Tensor | float, Tensor]


@dataclass(frozen=True)
class Preconditioning(ABC):
    """How a network's output becomes a denoised image; plain numbers, so that a configuration can hold them.

    Attributes:
        sigma_data: standard deviation of the data.
        sigma_min, sigma_max: the noise levels of training and sampling, finite and clamped to `supported`.
    """

    sigma_data: Sigma = 0.5
    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0

    def __post_init__(self) -> None:
        """Raises: ValueError: the noise levels are no range."""
        low, high = self.supported
        object.__setattr__(self, "sigma_min", max(self.sigma_min, low))
        object.__setattr__(self, "sigma_max", min(self.sigma_max, high))
        if not (0 < self.sigma_data < math.inf and 0 < self.sigma_min < self.sigma_max < math.inf):
            raise ValueError(
                f"sigma_data is {self.sigma_data:g}, sigma_min {self.sigma_min:g}, sigma_max {self.sigma_max:g}, where "
                "all must be positive and finite, and sigma_min below sigma_max"
            )

    @property
    def supported(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the official network supports."""
        return 0.0, math.inf

    @property
    def reads_time(self) -> bool:
        """Returns whether c_noise is the time t."""
        return False

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """Returns the network's noise condition, in sigma's dtype.  sigma any shape"""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Returns c_skip, c_out, c_in and c_noise in sigma's dtype, by the official arithmetic.  sigma any shape"""

    @abstractmethod
    def trigflow(self, t: Tensor) -> Coefficients:
        """Returns a, b, c and c_noise of F = a x_t + b F_raw(c x_t, c_noise).  t in (0, pi/2), float64, any shape"""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Returns the nearest noise level that the network supports; most support all."""
        return sigma


@dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM and EDM2: unit variance in and out, so that F = -F_raw(x_t / sigma_data).  Source: EDM, table 1.

    Attributes:
        c_noise_scale: c_noise / ln(sigma): 1/4, in OpenAI's networks of the same kind 250.
        c_noise_kind: log_sigma, or time: then c_noise is t = arctan(sigma / sigma_data).  Source: sCM, section 4.1.
    """

    c_noise_scale: Annotated[float, Meta(gt=0, le=1e6)] = 0.25
    c_noise_kind: Literal["log_sigma", "time"] = "log_sigma"

    @property
    def reads_time(self) -> bool:
        return self.c_noise_kind == "time"

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_data).atan() if self.reads_time else self.c_noise_scale * sigma.log()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        return c_skip, c_out, 1 / variance.sqrt(), self.c_noise(sigma)

    def trigflow(self, t: Tensor) -> Coefficients:
        return 0.0, -1.0, 1 / self.sigma_data, t if self.reads_time else self.c_noise(self.sigma_data * t.tan())


@dataclass(frozen=True)
class ConsistencyBoundary(Preconditioning):
    """EDM's with the identity at sigma_min in place of 0, as consistency models have it.

    Attributes:
        c_noise_scale: see EDM.
    Source: Song et al. 2023 (consistency models), appendix C.
    """

    c_noise_scale: Annotated[float, Meta(gt=0, le=1e6)] = 0.25

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.c_noise_scale * sigma.log()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        above, scale = sigma - self.sigma_min, (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return c_skip, above * self.sigma_data / scale, 1 / scale, self.c_noise(sigma)

    def trigflow(self, t: Tensor) -> Coefficients:
        cos, sin = t.cos(), t.sin()
        c_skip, c_out, c_in, c_noise = self.coefficients(self.sigma_data * t.tan())
        return (cos - c_skip / cos) / (sin * self.sigma_data), -c_out / (sin * self.sigma_data), c_in / cos, c_noise


class NoisePrediction(Preconditioning):
    """D = x + sign sigma F_raw(c_in x): the network predicts the noise, up to its sign."""

    sign: float

    def c_in(self, sigma: Tensor) -> Tensor:
        """Returns the scale of the network's input, for data of unit variance.  sigma any shape"""
        return 1 / (sigma**2 + 1).sqrt()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return 1.0, self.sign * sigma, self.c_in(sigma), self.c_noise(sigma)

    def trigflow(self, t: Tensor) -> Coefficients:
        tan, cos = t.tan(), t.cos()
        sigma = self.sigma_data * tan
        return -tan / self.sigma_data, -self.sign / cos, self.c_in(sigma) / cos, self.c_noise(sigma)


@dataclass(frozen=True)
class VP(NoisePrediction):
    """Variance preserving, sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).  Source: EDM, table 1.

    Attributes:
        beta_d, beta_min: extent and initial slope of the noise schedule.
        M: number of DDPM time steps.
        epsilon_t: lowest t of training.
    """

    beta_d: Annotated[float, Meta(gt=0, le=1e3)] = 19.9
    beta_min: Annotated[float, Meta(ge=0, le=1e3)] = 0.1
    M: Annotated[int, Meta(ge=2, le=1_000_000)] = 1000
    epsilon_t: Annotated[float, Meta(gt=0, lt=1)] = 1e-5

    sign = -1.0

    @property
    def supported(self) -> tuple[float, float]:
        # float32, as the official attributes: samplers clamp to them.
        t = torch.tensor([self.epsilon_t, 1.0], dtype=torch.float32, device="cpu")
        low, high = ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt().tolist()
        return low, high

    def c_noise(self, sigma: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return (self.M - 1) * ((root - self.beta_min) / self.beta_d)


@dataclass(frozen=True)
class VE(NoisePrediction):
    """Variance exploding.  Source: EDM, table 1."""

    sigma_min: Sigma = 0.02
    sigma_max: Sigma = 100.0

    sign = 1.0

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (0.5 * sigma).log()

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


MAX_LEVELS = 10_000


@cache
def _iddpm_levels(C_1: float, C_2: float, M: int) -> Tensor:
    """Returns the M + 1 noise levels u_0 > ... > u_M = 0, float32 as in the official state.  Source: EDM, table 1."""
    if not 0 < M <= MAX_LEVELS:
        raise ValueError(f"M, the number of iDDPM's noise levels, must be 1 to {MAX_LEVELS}, not {M}")

    def alpha_bar(j: int) -> Tensor:
        return (0.5 * math.pi * torch.tensor(j, dtype=torch.float32, device="cpu") / M / (C_2 + 1)).sin() ** 2

    u = torch.zeros(M + 1, dtype=torch.float32, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar(j - 1) / alpha_bar(j)).clip(min=C_1) - 1).sqrt()
    return u


@dataclass(frozen=True)
class IDDPM(NoisePrediction):
    """Improved DDPM: M discrete noise levels; the network is conditioned on the nearest.  Source: EDM, table 1.

    Attributes:
        C_1, C_2: keep the ends of the schedule finite.
        M: number of noise levels.
    """

    C_1: Annotated[float, Meta(gt=0, lt=1)] = 0.001
    C_2: Annotated[float, Meta(gt=0, le=1)] = 0.008
    M: Annotated[int, Meta(ge=2, le=MAX_LEVELS)] = 1000

    sign = -1.0

    @cached_property
    def _levels(self) -> Constant:
        return Constant(self.levels)

    @cached_property
    def levels(self) -> Tensor:
        """The official buffer `u`.  [M+1] float32, descending to 0"""
        return _iddpm_levels(self.C_1, self.C_2, self.M)

    @property
    def supported(self) -> tuple[float, float]:
        return float(self.levels[self.M - 1]), float(self.levels[0])

    def index(self, sigma: Tensor) -> Tensor:
        """Returns the index of the nearest noise level.  int64, shape of sigma

        Raises: TrainingError: sigma has a tangent. The index is a step function, whose derivative of 0 would claim that
            the network does not depend on time.
        """
        if not isinstance(sigma, Tensor):  # a Dual
            raise TrainingError(
                f"an iDDPM network has {self.M} discrete noise levels, so it has no derivative in time: "
                "use a teacher with EDM, VP or VE preconditioning"
            )
        levels = self._levels.on(sigma.device, sigma.dtype)
        return (sigma[..., None] - levels).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self._levels.on(sigma.device, sigma.dtype).take(self.index(sigma))

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (self.M - 1 - self.index(sigma)).to(sigma.dtype)


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    "edm": EDM,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "consistency": ConsistencyBoundary,
}


def make_preconditioning(kind: str, numbers: Mapping[str, object]) -> Preconditioning:
    """Returns the preconditioning of that kind, a key of PRECONDITIONINGS.

    Raises: ValueError: an unknown number, or one of the wrong type or out of range.
    """
    class_ = PRECONDITIONINGS[kind]
    for name in numbers.keys() - {field.name for field in fields(class_)}:
        raise ValueError(f"{name[:100]}: the preconditioning {kind} has no such argument")
    made: Preconditioning = validated(numbers, class_)
    return made
