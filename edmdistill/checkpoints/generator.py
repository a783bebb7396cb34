"""A distilled network, ready to be asked for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.networks.flow import FlowNetwork
from edmdistill.schedules import generator_sigmas
from edmdistill.trigflow import sigma_to_time


class Generator(nn.Module):
    """A few-step generator: one evaluation takes a point on the circle to its data.

    One that reads a second time (CTM's) takes it to any earlier time as well, and knows the score.

    Attributes:
        flow, config: its network and its checkpoint's configuration.
    """

    def __init__(self, flow: FlowNetwork, config: CheckpointConfig) -> None:
        super().__init__()
        self.flow = flow
        self.config = config

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of its classes, if its checkpoint holds any."""
        return self.config.label_names

    @property
    def guidance(self) -> tuple[float, float]:
        """The least and the greatest weight of guidance that it knows; (1, 1): none."""
        return self.config.guidance.range if self.config.guidance is not None else (1.0, 1.0)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """x0 = cos(t) x_t - sin(t) sigma_data F(x_t, t).

        Args:
            x_t: points on the circle.  [B,C,H,W]
            t: their times in [0, pi/2].  [] or [B]
            labels: class numbers [B] or vectors [B,label_dim]; None = unconditional.
            w: weights of guidance, where it knows several; None = the least.  [] or [B]
        Returns: x0.  [B,C,H,W] float32, float64 if the parameters are
        """
        return self.jump(x_t, t, torch.zeros_like(t), labels, w)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """x_s, by FlowNetwork.jump; w as in forward."""
        if w is None and self.flow.guided:
            w = torch.tensor(self.guidance[0])
        return self.flow.jump(x_t, t, s, labels, w)

    def schedule(self, nfe: int) -> Tensor:
        """Times to evaluate at, falling, in radians: the checkpoint's own, else EDM's curve.  [nfe] float64"""
        own = self.config.sampling.sigmas.get(str(nfe))
        sigmas = own or generator_sigmas(nfe, self.flow.sigma_min, self.flow.sigma_max)
        return sigma_to_time(torch.as_tensor(sigmas, dtype=torch.float64), self.flow.sigma_data)
