"""The exported module: a network in EDM's view, whose inputs and outputs are tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edmdistill.kernels.linear import lay_out_weights
from edmdistill.networks.base import Conditioning, Network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import Preconditioning


class OneStep(nn.Module):
    """One network evaluation, from a noisy image to the image.

    Further steps are left to the caller; MORE_STEPS describes them.

    Attributes:
        network, preconditioning: as in FlowNetwork, the network folded.
    """

    def __init__(self, network: Network, preconditioning: Preconditioning) -> None:
        super().__init__()
        network.fold(lay_out=False)
        lay_out_weights(network, plain=True)  # programs of torch.export hold no other layout
        self.network = network
        self.preconditioning = preconditioning

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        w: Tensor | None = None,
        sigma_next: Tensor | None = None,
    ) -> Tensor:
        """Returns D(x; sigma), by the official arithmetic: Denoiser's, without branches on the values of a tensor.

        For a network of two times this is CTM's g(x, sigma, sigma_next). In either case, the jump is

            x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) x0

        Args:
            x: x0 + sigma n, n unit normal; the first is sigma n alone.  [B,C,H,W] float32
            sigma: noise levels.  [B] float32
            labels: class numbers, -1 = no class; None = no class for all.  [B] int64
            w: weights of guidance, for a guided network.  [B] float32
            sigma_next: the target of the jump, for a network of two times; clamped to the network's range, so 0 means
                sigma_min; None = 0, the image.  [B] float32
        Returns: x0.  [B,C,H,W] float32
        Source: Kim et al. 2024 (CTM), section 3, for the jump.
        """
        pre = self.preconditioning
        c_skip, c_out, c_in, c_noise = pre.coefficients(sigma[:, None, None, None])
        second = None
        if self.network.two_time:
            aim = torch.zeros_like(sigma) if sigma_next is None else sigma_next
            second = pre.c_noise(aim.clamp(pre.sigma_min, pre.sigma_max))
        vectors = None
        if labels is not None:
            classes = torch.arange(self.network.label_dim, device=labels.device)
            vectors = (labels[:, None] == classes).to(x.dtype)
        dtype = next(self.network.parameters()).dtype
        condition = Conditioning(c_noise.flatten(), vectors, second, guidance_weight=w)
        raw = self.network((c_in * x).to(dtype), condition)
        assert isinstance(raw, Tensor)
        return c_skip * x + c_out * raw[:, : self.network.img_channels].to(x.dtype)


def example_inputs(flow: FlowNetwork) -> dict[str, Tensor]:
    """Returns arguments of OneStep for two images; labels, w and sigma_next where the network reads them."""
    arguments = {
        "x": torch.zeros(2, flow.img_channels, flow.img_resolution, flow.img_resolution),
        "sigma": torch.full((2,), flow.sigma_max),
    }
    if flow.label_dim:
        arguments["labels"] = torch.zeros(2, dtype=torch.int64)
    if flow.guided:
        arguments["w"] = torch.ones(2)
    if flow.two_time:
        arguments["sigma_next"] = torch.zeros(2)
    return arguments


def describe_inputs(flow: FlowNetwork) -> str:
    """Returns a description of the arguments, in Markdown."""
    size = f"[B,{flow.img_channels},{flow.img_resolution},{flow.img_resolution}]"
    words = {
        "x": f"x0 + sigma n, n unit normal noise; the first is sigma n alone. float32 {size}",
        "sigma": f"noise levels, from {flow.sigma_min:g} to {flow.sigma_max:g}. float32 [B]",
        "labels": f"class numbers, 0 to {flow.label_dim - 1}; -1 = no class. int64 [B]",
        "w": "guidance weights, in the range that `export.json` gives. float32 [B]",
        "sigma_next": "noise levels below sigma, the target of the step; 0 = the images. float32 [B]",
        "x0": f"the images, nominally in [-1, 1]; latents in the network's scale. float32 {size}",
    }
    return "\n".join(f"- `{name}`: {words[name]}" for name in (*example_inputs(flow), "x0"))


MORE_STEPS = """\
More steps: `export.json` holds their noise levels under `sigmas`, by the number of steps. From each level, sigma, to
the one after it, which is 0 at the end, with z fresh unit normal noise and gamma its share, 0 to 1 (`gamma` in that
file is the default):

    sigma_next = (1 - gamma**2) ** 0.5 * after
    x = sigma_next / sigma * x + (1 - sigma_next / sigma) * x0 + gamma * after * z

With gamma = 1 this is x0 + after * z; the last x is x0.
"""
