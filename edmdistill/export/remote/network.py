"""The network, as a model of diffusers: an image with noise in, the image out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from edmdistill.export.one_step import OneStep
from edmdistill.networks import NETWORKS
from edmdistill.networks.preconditioning import PRECONDITIONINGS


class EdmdistillNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A denoiser in EDM's view; weights that were normalized while it learned are plain ones here.

    Args:
        kind: song (DDPM++, NCSN++), adm or edm2.
        arguments: of that network.
        preconditioning: kind, and its numbers.
    """

    _keep_in_fp32_modules = ["emb_fourier", "map_noise"]  # frequencies, which half precision would detune
    source = Path(__file__).read_text(encoding="utf-8")  # for GammaPipeline.save_pretrained

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, kind: str, arguments: dict[str, Any], preconditioning: dict[str, Any]) -> None:
        super().__init__()
        numbers = {name: value for name, value in preconditioning.items() if name != "kind"}
        self.one_step = OneStep(NETWORKS[kind](**arguments), PRECONDITIONINGS[preconditioning["kind"]](**numbers))

    def forward(self, sample: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **options: Tensor) -> Tensor:
        """Returns x0 of x0 + sigma n.

        Args:
            sample: x0 + sigma n.  [B,C,H,W] float32
            sigma: noise levels.  [B] float32
            class_labels: -1 = no class; None = no class for all.  [B] int64
            options: w and sigma_next, see OneStep.
        """
        x0: Tensor = self.one_step(sample, sigma, class_labels, **options)
        return x0
