"""What is exported: a network in EDM's view, with nothing about it but tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edmdistill.networks.base import Network
from edmdistill.networks.preconditioning import FlowNetwork, Preconditioning


class OneStep(nn.Module):
    """One network evaluation, from an image with noise to the image.

    More steps are the caller's: x = x0 + sigma n with a lower sigma and fresh noise n, and again.

    Attributes:
        network, preconditioning: as in FlowNetwork, the network folded.
    """

    def __init__(self, network: Network, preconditioning: Preconditioning) -> None:
        super().__init__()
        network.fold()
        self.network = network
        self.preconditioning = preconditioning

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """D(x; sigma), by the official arithmetic; Denoiser's, without what depends on the values of a tensor.

        Args:
            x: x0 + sigma n, n unit normal; the first is sigma n alone.  [B,C,H,W] float32
            sigma: noise levels.  [B] float32
            labels: class numbers, -1 = no class; None = no class for all.  [B] int64
            w: weights of guidance, for a guided network.  [B] float32
        Returns: x0.  [B,C,H,W] float32
        """
        c_skip, c_out, c_in, c_noise = self.preconditioning.coefficients(sigma[:, None, None, None])
        vectors = None
        if labels is not None:
            classes = torch.arange(self.network.label_dim, device=labels.device)
            vectors = (labels[:, None] == classes).to(x.dtype)
        dtype = next(self.network.parameters()).dtype
        raw = self.network((c_in * x).to(dtype), c_noise.flatten(), vectors, w=w)
        assert isinstance(raw, Tensor)
        return c_skip * x + c_out * raw[:, : self.network.img_channels].to(x.dtype)


def example(flow: FlowNetwork) -> dict[str, Tensor]:
    """Arguments of OneStep for two images; labels where there are classes, w where the network is guided."""
    arguments = {
        "x": torch.zeros(2, flow.img_channels, flow.img_resolution, flow.img_resolution),
        "sigma": torch.full((2,), flow.sigma_max),
    }
    if flow.label_dim:
        arguments["labels"] = torch.zeros(2, dtype=torch.int64)
    if flow.guided:
        arguments["w"] = torch.ones(2)
    return arguments


def inputs(flow: FlowNetwork) -> str:
    """What the arguments are, in Markdown."""
    size = f"[B,{flow.img_channels},{flow.img_resolution},{flow.img_resolution}]"
    words = {
        "x": f"x0 + sigma n, n unit normal noise; the first is sigma n alone. float32 {size}",
        "sigma": f"noise levels, from {flow.sigma_min:g} to {flow.sigma_max:g}. float32 [B]",
        "labels": f"class numbers, 0 to {flow.label_dim - 1}; -1 = no class. int64 [B]",
        "w": "weights of the guidance that it has learnt, in the range that `export.json` has. float32 [B]",
        "x0": f"the images, nominally in [-1, 1]; latents as the network has them. float32 {size}",
    }
    return "\n".join(f"- `{name}`: {words[name]}" for name in (*example(flow), "x0"))


MORE_STEPS = """\
More steps: x = x0 + sigma n with the next lower sigma and fresh noise n, and again. `export.json` holds the noise
levels for 1 to 8 steps, under `sigmas`.
"""
