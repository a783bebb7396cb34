"""A distilled network, ready to sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edmdistill.arguments import checked
from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.inputs import Classes, Level, classes_of, levels, require_earlier, require_images
from edmdistill.schedules import generator_sigmas
from edmdistill.torch_state import as_tensor
from edmdistill.trigflow import sigma_to_time


class Generator(nn.Module):
    """A few-step generator: one evaluation maps a point on the circle to data.

    One that reads a second time (CTM's) also maps it to any earlier time, and gives the score.

    Attributes:
        flow, config: its network and its checkpoint's configuration.
        sigma_data, sigma_min, sigma_max, img_resolution, img_channels, label_dim: of the flow, as a Denoiser's.
    """

    def __init__(self, flow: FlowNetwork, config: CheckpointConfig) -> None:
        super().__init__()
        self.flow = flow
        self.config = config
        self.sigma_data, self.sigma_min, self.sigma_max = flow.sigma_data, flow.sigma_min, flow.sigma_max
        self.img_resolution, self.img_channels, self.label_dim = flow.img_resolution, flow.img_channels, flow.label_dim

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of its classes, if its checkpoint holds any."""
        return self.config.label_names

    @property
    def encoder(self) -> Mapping[str, Any]:
        """The kind of the network's images, see checkpoints.encoder."""
        return self.config.encoder

    @property
    def guidance(self) -> tuple[float, float]:
        """The smallest and the largest guidance weight that it accepts; (1, 1): none."""
        return self.config.guidance.range if self.config.guidance is not None else (1.0, 1.0)

    def forward(self, x_t: Tensor, t: Level, labels: Classes | None = None, w: Level | None = None) -> Tensor:
        """Returns x0 = cos(t) x_t - sin(t) sigma_data F(x_t, t).

        Args:
            x_t: points on the circle.  [B,C,H,W]
            t: their times in [0, pi/2].  [] or [B]
            labels: one class, class numbers [B] or vectors [B,label_dim]; None = unconditional.
            w: guidance weights, where it accepts a range; None = the smallest.  [] or [B]
        Returns: x0.  [B,C,H,W] float32, float64 if the parameters are
        Raises: EdmDistillError: one of them is not that.
        """
        require_images(x_t, self.flow.network)
        t = levels(t, "t", len(x_t))
        return self.jump(x_t, t, torch.zeros_like(t), labels, w)

    def jump(
        self,
        x_t: Tensor,
        t: Level,
        s: Level,
        labels: Classes | None = None,
        w: Level | None = None,
    ) -> Tensor:
        """Returns x_s, by FlowNetwork.jump; arguments and errors as in forward.

        Args:
            s: the times to jump to, in [0, t].  [] or [B]
        """
        require_images(x_t, self.flow.network)
        t, s = levels(t, "t", len(x_t)), levels(s, "s", len(x_t))
        require_earlier(s, t)
        labels = classes_of(x_t, labels, self.flow.label_dim)
        if w is not None:
            if not self.flow.guided:
                raise EdmDistillError("this generator was trained for no range of guidance weights: leave w out")
            w = levels(w, "w", len(x_t))
        elif self.flow.guided:
            w = as_tensor(self.guidance[0])
        return self.flow.jump(x_t, t, s, labels, w)

    @checked
    def schedule(self, nfe: int) -> Tensor:
        """Returns the times of `nfe` steps, in radians, decreasing: the checkpoint's or EDM's curve.  [nfe] float64"""
        if nfe < 1:
            raise EdmDistillError(f"the number of network evaluations must be at least 1, but it is {nfe}")
        stored = self.config.sampling.sigmas.get(str(nfe))
        sigmas = stored or generator_sigmas(nfe, self.flow.sigma_min, self.flow.sigma_max)
        return sigma_to_time(torch.as_tensor(sigmas, dtype=torch.float64), self.flow.sigma_data)
