"""From the raw network to a denoiser, and to the flow on the TrigFlow circle: two readings of one network.

EDM's view is D(x; sigma) = c_skip x + c_out F_raw(c_in x, c_noise); TrigFlow's is F(x_t, t), x_t = cos(t) x and
D = cos(t) x_t - sin(t) sigma_data F. Solved for F, without the cancellation of going through D:

    F = a x_t + b F_raw(c x_t, c_noise)

Source: Karras et al. 2022 (EDM), table 1; Lu & Song 2025 (sCM), appendix B.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from edmdistill.errors import TrainingError
from edmdistill.kernels.dual import Dual
from edmdistill.networks.base import Network
from edmdistill.networks.last_layer import LastLayer, watched
from edmdistill.trigflow import ddim_step, expand

Coefficients = tuple[Tensor | float, Tensor | float, Tensor | float, Tensor]


@dataclass(frozen=True)
class Preconditioning(ABC):
    """How a network's output becomes a denoised image. Plain numbers, so that a configuration can hold them.

    Attributes:
        sigma_data: standard deviation of the data.
        sigma_min, sigma_max: the noise levels of training and sampling, finite and cut to `supported`.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        low, high = self.supported
        object.__setattr__(self, "sigma_min", max(self.sigma_min, low))
        object.__setattr__(self, "sigma_max", min(self.sigma_max, high))

    @property
    def supported(self) -> tuple[float, float]:
        """The least and the greatest noise level that the official network takes."""
        return 0.0, math.inf

    @property
    def reads_time(self) -> bool:
        """Whether c_noise is t itself."""
        return False

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's noise condition.  sigma any shape; dtype of sigma"""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out, c_in and c_noise in sigma's dtype, by the official arithmetic.  sigma any shape"""

    @abstractmethod
    def trigflow(self, t: Tensor) -> Coefficients:
        """a, b, c and c_noise of F = a x_t + b F_raw(c x_t, c_noise).  t in (0, pi/2), float64, any shape"""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network knows; most know all."""
        return sigma


@dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM and EDM2: unit variance in and out, so that F = -F_raw(x_t / sigma_data).  Source: EDM, table 1.

    Attributes:
        c_noise_scale: c_noise / ln(sigma).  1/4; OpenAI's networks of the same kind have 1000 times that.
        c_noise_kind: log_sigma, or time: then c_noise is t = arctan(sigma / sigma_data).  Source: sCM, section 4.1.
    """

    c_noise_scale: float = 0.25
    c_noise_kind: Literal["log_sigma", "time"] = "log_sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c_noise_kind not in ("log_sigma", "time"):
            raise ValueError(f"c_noise is log_sigma or time, but {self.c_noise_kind!r} was asked for")

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


class NoisePrediction(Preconditioning):
    """D = x + sign sigma F_raw(c_in x): the network names the noise, up to its sign."""

    sign: float

    @abstractmethod
    def c_in(self, sigma: Tensor) -> Tensor:
        """The scale of the network's input.  sigma any shape"""

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
        epsilon_t: least t of training.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    sign = -1.0

    @property
    def supported(self) -> tuple[float, float]:
        # float32, as the official attributes: samplers clamp to them.
        t = torch.tensor([self.epsilon_t, 1.0])
        low, high = ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt().tolist()
        return low, high

    def c_noise(self, sigma: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return (self.M - 1) * ((root - self.beta_min) / self.beta_d)

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + 1).sqrt()


@dataclass(frozen=True)
class VE(NoisePrediction):
    """Variance exploding.  Source: EDM, table 1."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    sign = 1.0

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (0.5 * sigma).log()

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@cache
def _iddpm_levels(C_1: float, C_2: float, M: int) -> Tensor:
    """The M + 1 noise levels u_0 > ... > u_M = 0, float32 as in the official state.  Source: EDM, table 1."""
    if not 0 < M <= 10_000:
        raise ValueError(f"iDDPM has 1 to 10000 noise levels, but {M} were asked for")

    def alpha_bar(j: int) -> Tensor:
        return (0.5 * math.pi * torch.tensor(j, device="cpu") / M / (C_2 + 1)).sin() ** 2

    u = torch.zeros(M + 1, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar(j - 1) / alpha_bar(j)).clip(min=C_1) - 1).sqrt()
    return u


@dataclass(frozen=True)
class IDDPM(NoisePrediction):
    """Improved DDPM: M discrete noise levels, the nearest one conditions the network.  Source: EDM, table 1.

    Attributes:
        C_1, C_2: what keeps the schedule's ends finite.
        M: number of noise levels.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    sign = -1.0

    @cached_property
    def levels(self) -> Tensor:
        """The official buffer `u`.  [M+1] float32, descending to 0"""
        return _iddpm_levels(self.C_1, self.C_2, self.M)

    @property
    def supported(self) -> tuple[float, float]:
        return float(self.levels[self.M - 1]), float(self.levels[0])

    def index(self, sigma: Tensor) -> Tensor:
        """Number of the nearest noise level.  int64, shape of sigma

        Raises: TrainingError: sigma has a tangent. The number climbs in steps: its derivative, 0 between them, would
            say that the network does not feel the time.
        """
        if not isinstance(sigma, Tensor):  # a Dual
            raise TrainingError(
                f"an iDDPM network knows {self.M} noise levels and none between, so it has no derivative in time: "
                "take a teacher with EDM, VP or VE preconditioning"
            )
        levels = self.levels.to(sigma.device, sigma.dtype)
        return (sigma[..., None] - levels).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.levels.to(sigma.device, sigma.dtype)[self.index(sigma)]

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (self.M - 1 - self.index(sigma)).to(sigma.dtype)

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + 1).sqrt()


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {"edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM}


def class_vectors(labels: Tensor | None, label_dim: int) -> Tensor | None:
    """Class numbers [B] or vectors [B,label_dim] as float vectors [B,label_dim]; None stays None.

    Raises: ValueError: a class number that is not in [0, label_dim).
    """
    if labels is None or label_dim == 0:
        return None
    if labels.is_floating_point():
        return labels.reshape(-1, label_dim)
    if labels.ndim <= 1:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= label_dim:
            wrong = low if low < 0 else high
            raise ValueError(f"the network knows classes 0 to {label_dim - 1}, but a label is {wrong}")
        return nn.functional.one_hot(labels.long().reshape(-1), label_dim).float()
    return labels.reshape(-1, label_dim).float()


def c_of_logvar(sigma: Tensor) -> Tensor:
    """ln(sigma)/4, what u reads: EDM2's condition, and also where the network's own is another.  sigma any shape"""
    return sigma.log() / 4


class FlowNetwork(nn.Module):
    """The network on the TrigFlow circle: what methods train and what checkpoints hold.

    Attributes:
        network, preconditioning: what is wrapped.
        compute_dtype: dtype of the activations inside the network; None = the dtype of the result.
        sigma_data, sigma_min, sigma_max: of the preconditioning.
        img_resolution, img_channels, label_dim, two_time, guided: of the network.
    """

    def __init__(
        self, network: Network, preconditioning: Preconditioning, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning
        self.compute_dtype = compute_dtype
        self.sigma_data = preconditioning.sigma_data
        self.sigma_min = preconditioning.sigma_min
        self.sigma_max = preconditioning.sigma_max
        self.img_resolution = network.img_resolution
        self.img_channels = network.img_channels
        self.label_dim = network.label_dim
        self.two_time = network.two_time
        self.guided = network.guided

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, times and results outside the network: float32, or float64 if the parameters are."""
        wide = next(self.network.parameters()).dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def raw(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None,
        c_noise_t: Tensor | None = None,
        c_logvar: tuple[Tensor, ...] = (),
        w: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The network's own output, without channels that nobody reads (iDDPM's variances), and what u is asked."""
        if w is None and self.guided:
            w = torch.ones(1, device=x.device)
        out = self.network(
            x.to(self.compute_dtype or self.dtype),
            c_noise.flatten().to(self.dtype),
            class_vectors(labels, self.label_dim),
            None if c_noise_t is None else c_noise_t.flatten().to(self.dtype),
            None,  # augmentation is for training from images alone
            tuple(c.flatten().to(self.dtype) for c in c_logvar),
            None if w is None else w.flatten().to(x.device, self.dtype),
        )
        F, *u = out if c_logvar else (out,)
        return F[:, : self.img_channels].to(self.dtype), *u

    def watch(self) -> AbstractContextManager[LastLayer]:
        """Within it, the last layer remembers its calls."""
        return watched(self.network.last_layer)

    def clamp(self, t: Tensor, x: Tensor) -> Tensor:
        """t, broadcast over x, cut to the times of sigma_min and sigma_max: at 0 and pi/2, c_noise is infinite."""
        low = math.atan(self.sigma_min / self.sigma_data)
        high = math.atan(self.sigma_max / self.sigma_data)
        return expand(t, x).clamp(low, high)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        second: Tensor | None = None,
        *,
        u_at: tuple[Tensor, ...] = (),
        w: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """F, with dx_t/dt = sigma_data F; with u_at, F, u_1, ..., u_n, each the log variance of a loss at its times.

        Args:
            x_t: points on the circle.  [B,C,H,W]
            t: their times in [0, pi/2].  [] or [B]
            labels: class numbers [B] or vectors [B,label_dim]; None = unconditional.
            second: the second time, in [0, pi/2], for a two_time network; None = not asked.  [] or [B]
            u_at: the times, in [0, pi/2], at which the first n heads are asked.  n of [] or [B]
            w: the weight of guidance, for a guided network; None = 1, no guidance.  [] or [B]
        Returns: F [B,C,H,W], or F and n of [B], [1] for one time; float32, float64 if the parameters are
        Raises: ValueError: a second time for a network of one, w for one that reads none, or a label out of range.
            NotImplementedError: the network has fewer heads for u.
        """
        if second is not None and not self.two_time:
            raise ValueError("the network reads one time, but two were given: give it a second with add_second_time")
        if w is not None and not self.guided:
            raise ValueError("the network reads no weight of guidance, but one was given: add it with add_guidance")
        x_t = x_t.to(self.dtype)
        t = self.clamp(t, x_t)
        a, b, c, c_noise = self.preconditioning.trigflow(t)
        c_noise_t = None
        if second is not None:
            c_noise_t = self.preconditioning.trigflow(self.clamp(second, x_t))[-1]
        c_logvar = tuple(c_of_logvar(self.sigma_data * self.clamp(time, x_t).tan()) for time in u_at)
        raw, *u = self.raw((c * x_t).to(self.dtype), c_noise, labels, c_noise_t, c_logvar, w)
        F = (a * x_t + b * raw).to(self.dtype)
        return (F, *u) if u_at else F

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """x_s = cos(t-s) x_t - sin(t-s) sigma_data F: by a network of two times, F(x_t, t, s), where the trajectory is.

        By one of a single time, where its data and the noise that they imply lie at s.

        Args:
            x_t, t, labels, w: as in forward.
            s: times in [0, t].  [] or [B]
        Returns: x_s.  [B,C,H,W] float32, float64 if the parameters are
        """
        x_t = x_t.to(self.dtype)
        F = self(x_t, t, labels, s if self.two_time else None, w=w)
        return ddim_step(x_t, F, t, s, self.sigma_data)

    @torch.no_grad()
    def tangent(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None,
        dx: Tensor,
        dt: Tensor,
        second: Tensor | None = None,
        dsecond: Tensor | None = None,
        *,
        w: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """F, and its derivative along (dx, dt), without gradient.

        Where the network is in training, its dropout is that of the next forward pass, for the random numbers drawn
        here are given back: F is then what that pass gives, bit for bit in eager mode.

        Along a trajectory, dx = dx_t/dt and dt = 1 give dF/dt, which grows without bound towards t = 0 and pi/2. With
        r = cos(t) sin(t), dx = r dx_t/dt and dt = r give r dF/dt, and c_noise = ln(sigma)/4 the tangent 1/4 at any t.

        Args:
            x_t, t, labels, second, w: as in forward; w stands still.
            dx: of the shape of x_t.
            dt: of the shape of t.
            dsecond: of the shape of second; None = the second time stands still.
        Returns: F and its tangent.  [B,C,H,W] float32, float64 if the parameters are
        Raises: ValueError: as in forward; shapes differ; torch's own forward derivative is at work.
            TrainingError: an iDDPM network, which has no derivative in time.
        Source: sCM, section 5.1.  Differs: the paper's tangent of t, r sigma_data, makes it sigma_data r dF/dt; and its
            network reads x_t / sigma_data, where ours divides by itself.
        """
        moved = second if second is None or dsecond is None else Dual(second, dsecond)
        with torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):
            F = self(Dual(x_t, dx), Dual(t, dt), labels, moved, w=w)
        return F.value, F.tangent


class Denoiser(nn.Module):
    """EDM's view of the same network, by the official arithmetic: x0 from x = x0 + sigma n.

    A network of two times is asked with both the same: CTM's g(x, t, t).
    """

    def __init__(self, flow: FlowNetwork) -> None:
        super().__init__()
        self.flow = flow
        self.sigma_data = flow.sigma_data
        self.sigma_min = flow.sigma_min
        self.sigma_max = flow.sigma_max
        self.img_resolution = flow.img_resolution
        self.img_channels = flow.img_channels
        self.label_dim = flow.label_dim

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D(x; sigma), the expected image.

        Args:
            x: images with noise of standard deviation sigma, any float dtype.  [B,C,H,W]
            sigma: noise levels in (0, inf).  [] or [B]
            labels: class numbers [B] or vectors [B,label_dim]; None = unconditional.
        Returns: x0.  [B,C,H,W] float32, float64 if the parameters are
        """
        x = x.to(self.flow.dtype)
        sigma = sigma.to(x.device, x.dtype).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.flow.preconditioning.coefficients(sigma)
        second = c_noise if self.flow.two_time else None
        return c_skip * x + c_out * self.flow.raw(c_in * x, c_noise, labels, second)[0]

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), the log variance of the denoising loss.  sigma [] or [B] -> [B,1,1,1]

        Source: EDM2, eq. 21.
        """
        return self.flow.network.logvars((c_of_logvar(sigma.to(self.flow.dtype).flatten()),))[0].reshape(-1, 1, 1, 1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network knows, in sigma's shape and dtype."""
        return self.flow.preconditioning.round_sigma(sigma)
