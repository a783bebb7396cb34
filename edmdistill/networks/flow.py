"""One network, two views: the flow on the TrigFlow circle, and EDM's denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.kernels.dual import Dual
from edmdistill.networks.base import Conditioning, Judgment, Network
from edmdistill.networks.inputs import Classes, Level, class_vectors, classes_of, levels, require_images
from edmdistill.networks.preconditioning import Preconditioning
from edmdistill.networks.surgery.last_layer import LastLayer, watched
from edmdistill.torch_state import as_tensor
from edmdistill.transfer import to_device
from edmdistill.trigflow import ddim_step, expand


def logvar_c_noise(sigma: Tensor) -> Tensor:
    """Returns ln(sigma)/4, the input of log variances; EDM2's, whatever the network's c_noise.  sigma any shape"""
    return sigma.log() / 4


class FlowNetwork(nn.Module):
    """A network on the TrigFlow circle: what methods train and checkpoints hold.

    Attributes:
        network, preconditioning: what is wrapped.
        compute_dtype: dtype of the activations inside the network; None = the dtype of the result.
        draws: random numbers of the current rows, for dropout in training; None = torch's global generator.
        sigma_data, sigma_min, sigma_max: of the preconditioning.
        img_resolution, img_channels, label_dim, two_time, guided, augment_dim: of the network.
        label_dropout: fraction of training in which the network was given no class, in [0, 1]; default: the network's
            argument, 0 for EDM2, which has none.
    """

    def __init__(
        self,
        network: Network,
        preconditioning: Preconditioning,
        compute_dtype: torch.dtype | None = None,
        label_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning
        self.compute_dtype = compute_dtype
        self.draws: Draws | None = None
        self.sigma_data = preconditioning.sigma_data
        self.sigma_min = preconditioning.sigma_min
        self.sigma_max = preconditioning.sigma_max
        self.img_resolution = network.img_resolution
        self.img_channels = network.img_channels
        self.label_dim = network.label_dim
        self.two_time = network.two_time
        self.guided = network.guided
        self.augment_dim: int = network.arguments.get("augment_dim") or 0
        self.label_dropout: float = network.label_dropout if label_dropout is None else label_dropout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs, times and results: float32, or float64 if the parameters are."""
        wide = next(self.network.parameters()).dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the activations inside the network."""
        return self.compute_dtype or self.dtype

    @property
    def device(self) -> torch.device:
        """The device where it computes."""
        return self.network.execution_device or next(self.network.parameters()).device

    def conditioning(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None,
        c_noise_second: Tensor | None = None,
        c_logvar: tuple[Tensor, ...] = (),
        w: Tensor | None = None,
        logits: Judgment = "none",
        features: bool = False,
        augment_labels: Tensor | None = None,
    ) -> Conditioning:
        """Returns what the network reads beside x, in its dtypes.  Noise levels of any shape, labels as in forward"""
        if w is None and self.guided:
            w = torch.ones(1, device=x.device)
        return Conditioning(
            c_noise.flatten().to(self.dtype),
            None if labels is None or not self.label_dim else class_vectors(labels, self.label_dim),
            None if c_noise_second is None else c_noise_second.flatten().to(self.dtype),
            augment_labels,
            c_logvar=tuple(c.flatten().to(self.dtype) for c in c_logvar),
            guidance_weight=None if w is None else w.flatten().to(x.device, self.dtype),
            dropout_keys=self.dropout_keys(x) if self.training else None,
            logits=logits,
            features=features,
        )

    def raw(self, x: Tensor, condition: Conditioning) -> tuple[Tensor, ...]:
        """Returns the network's output, without unused channels (iDDPM's variances), logits and log variances."""
        out = self.network(x.to(self.activation_dtype), condition)
        F, *more = out if isinstance(out, tuple) else (out,)
        return F[:, : self.img_channels].to(self.dtype), *more

    def dropout_keys(self, x: Tensor) -> Tensor:
        """Returns the dropout keys of a pass; one without gradient has those of the next pass with gradient.  [B]"""
        if self.draws is not None:
            return self.draws.dropout(advance=torch.is_grad_enabled(), times=x.shape[0] // len(self.draws))
        with torch.random.fork_rng([], enabled=not torch.is_grad_enabled()):
            return to_device(torch.randint(2**62, x.shape[:1], device="cpu"), x.device)

    def watch(self) -> AbstractContextManager[LastLayer]:
        """Records the last layer's calls while the context is open."""
        return watched(self.network.last_layer)

    def clamp(self, t: Tensor, x: Tensor) -> Tensor:
        """Returns t, broadcast over x, within the times of sigma_min and sigma_max: c_noise is infinite at the ends."""
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
        logits: Judgment = "none",
        features: bool = False,
        along: tuple[Tensor, ...] = (),
        augment_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns F, with dx_t/dt = sigma_data F; with u_at, F, u_1, ..., u_n, each the log variance of a loss.

        With `along`, F is followed by its derivative in that direction, which has no gradient. F and its gradient are
        those of a call without, computed by the same kernels on the same numbers.

        A network with a head returns F and its logits, or those alone; any network returns its features.

        Args:
            x_t: points on the circle.  [B,C,H,W]
            t: their times in [0, pi/2].  [] or [B]
            labels: class numbers [B] or vectors [B,label_dim]; None = unconditional.
            second: the second time, in [0, pi/2], for a two_time network; None = not given.  [] or [B]
            u_at: the times, in [0, pi/2], at which the first n log variances are evaluated.  n of [] or [B]
            w: the guidance weight, for a guided network; None = 1, no guidance.  [] or [B]
            logits: whether the head's are returned.
            features: whether the encoder's are returned alone: [B,C,h,w] from each level, the bottleneck last.
            along: dx and dt, of the shapes of x_t and t, and dsecond of that of second, which without it is constant.
                Not with logits or features.
            augment_labels: EDM's augmentation labels, for a network with augment_dim; None = 0.  [B,augment_dim]
        Returns: F [B,C,H,W], or F and n of [B], [1] for one time; float32, float64 if the parameters are
        Raises: ValueError: a second time, w or augment_labels for a network without, or a label out of range; shapes
            differ; a direction has a gradient, or torch's own forward-mode differentiation is active.
            NotImplementedError: the network has fewer heads for log variances.
            TrainingError: along a time, an iDDPM network, which has no derivative there.
        """
        if along:
            dx, dt, *dsecond = along
            moving: list[Any] = [Dual(x_t, dx), Dual(t, dt), labels, second]
            if dsecond and second is not None:
                moving[3] = Dual(second, *dsecond)
            outputs: Any = self.forward(*moving, u_at=u_at, w=w, augment_labels=augment_labels)
            F, *u = outputs if u_at else (outputs,)
            return F.value, F.tangent, *u
        if second is not None and not self.two_time:
            raise ValueError("the network takes one time, but two were given: add a second with add_second_time")
        if w is not None and not self.guided:
            raise ValueError("the network takes no guidance weight, but one was given: add it with add_guidance")
        if augment_labels is not None and not self.augment_dim:
            raise ValueError("the network takes no augmentation labels, but some were given: make it with augment_dim")
        x_t = x_t.to(self.dtype)
        t = self.clamp(t, x_t)
        *coefficients, c_noise = self.preconditioning.trigflow(t)
        # In the images' dtype: in that of time, float64, they would widen the images.
        a, b, c = (number if isinstance(number, float) else number.to(self.dtype) for number in coefficients)
        c_noise_second = None
        if second is not None:
            c_noise_second = self.preconditioning.trigflow(self.clamp(second, x_t))[-1]
        c_logvar = tuple(logvar_c_noise(self.sigma_data * self.clamp(time, x_t).tan()) for time in u_at)
        condition = self.conditioning(
            x_t, c_noise, labels, c_noise_second, c_logvar, w, logits, features, augment_labels
        )
        if logits == "alone" or features:
            judged: Tensor | tuple[Tensor, ...] = self.network((c * x_t).to(self.activation_dtype), condition)
            return judged
        raw, *more = self.raw(c * x_t, condition)
        F = b * raw if isinstance(a, float) and a == 0 else a * x_t + b * raw
        return (F, *more) if more else F

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """Returns x_s = cos(t-s) x_t - sin(t-s) sigma_data F, by F(x_t, t, s), or F(x_t, t) for a network of one time.

        With two times this is the trajectory's point at s; with one, the DDIM step to s.

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
        """Returns F and its derivative along (dx, dt), without gradient.  Arguments and errors: as in forward.

        In training mode, the dropout is that of the next pass with gradient.

        Along a trajectory, dx = dx_t/dt and dt = 1 give dF/dt, which is unbounded toward t = 0 and pi/2. With
        r = cos(t) sin(t), dx = r dx_t/dt and dt = r give r dF/dt, and c_noise = ln(sigma)/4 has tangent 1/4 at any t.

        Source: sCM, section 5.1.  Differs: the paper's tangent of t is r sigma_data, which gives sigma_data r dF/dt;
            its network reads x_t / sigma_data, where ours divides inside.
        """
        along = (dx, dt) if dsecond is None else (dx, dt, dsecond)
        F, dF = self(x_t, t, labels, second, w=w, along=along)
        return F, dF


def equal_weights(a: FlowNetwork, b: FlowNetwork) -> bool:
    """Returns whether two networks on one device have equal weights, so that one as guide of the other does nothing."""
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Denoiser(nn.Module):
    """EDM's view of the same network, by the official arithmetic: x0 from x = x0 + sigma n.

    A network of two times is given the same time twice: CTM's g(x, t, t).

    Attributes: those of the FlowNetwork, and
        label_names: of its classes, if the checkpoint has them.
        encoder: of the checkpoint: what the network's images are, see checkpoints.encoder.
        images_seen: those that it was trained on, if the checkpoint says so.
    """

    label_names: tuple[str, ...] | None = None
    images_seen: int | None = None
    encoder: Mapping[str, Any] = MappingProxyType({"kind": "pixels"})

    def __init__(self, flow: FlowNetwork) -> None:
        super().__init__()
        self.flow = flow
        self.sigma_data, self.sigma_min, self.sigma_max = flow.sigma_data, flow.sigma_min, flow.sigma_max
        self.img_resolution, self.img_channels = flow.img_resolution, flow.img_channels
        self.label_dim, self.label_dropout = flow.label_dim, flow.label_dropout

    def forward(self, x: Tensor, sigma: Level, labels: Classes | None = None) -> Tensor:
        """Returns D(x; sigma), the expected image.

        Args:
            x: images with noise of standard deviation sigma, any float dtype.  [B,C,H,W]
            sigma: noise levels in (0, inf).  [] or [B]
            labels: one class, class numbers [B] or vectors [B,label_dim]; None = unconditional. A network without
                classes ignores them, as the official ones do.
        Returns: x0.  [B,C,H,W] float32, float64 if the parameters are
        Raises: EdmDistillError: one of them is not that.
        """
        require_images(x, self.flow.network)
        x = x.to(self.flow.dtype)
        sigma = levels(sigma, "sigma", len(x)).to(x.device, x.dtype).reshape(-1, 1, 1, 1)
        labels = classes_of(x, labels, self.label_dim)
        c_skip, c_out, c_in, c_noise = self.flow.preconditioning.coefficients(sigma)
        condition = self.flow.conditioning(x, c_noise, labels, c_noise if self.flow.two_time else None)
        return c_skip * x + c_out * self.flow.raw(c_in * x, condition)[0]

    def logvar(self, sigma: Level) -> Tensor:
        """Returns u(sigma), the log variance of the denoising loss.  sigma [] or [B] -> [B,1,1,1]

        Raises: EdmDistillError: the network does not estimate it, or sigma is no noise level.
        Source: EDM2, eq. 21.
        """
        device = next(self.flow.parameters()).device
        c_noise = logvar_c_noise(levels(sigma, "sigma", None).to(device, self.flow.dtype).flatten())
        if not self.flow.network.arguments["logvar_channels"]:
            raise EdmDistillError("this network does not estimate the variance of its loss, as EDM2's do")
        return self.flow.network.logvars((c_noise,))[0].reshape(-1, 1, 1, 1)

    def round_sigma(self, sigma: Level) -> Tensor:
        """Returns the nearest noise level that the network supports, in sigma's shape and dtype."""
        return self.flow.preconditioning.round_sigma(as_tensor(sigma))
