"""References and their features from files: what samples are pulled toward, and how they are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edmdistill.atomic import require_no_pipe
from edmdistill.checkpoints.load import Dtype, load_denoiser, weights_digest
from edmdistill.checkpoints.source import file_digest
from edmdistill.errors import EdmDistillError, counted
from edmdistill.features.script import Script
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.trajectory import ReferenceGuidance

LUMA = 0.299, 0.587, 0.114
MASK = "mask:"


@dataclass(frozen=True, kw_only=True)
class ReferenceFiles:
    """The files that a ReferenceGuidance is loaded from.

    Attributes:
        image: a picture of the network's size.
        feature_net: see `load_feature_net`.
        weight, correctors: see ReferenceGuidance.
        score: the source of a denoiser; see `load_denoiser`.
    """

    image: Path
    feature_net: str
    weight: float = 1.0
    correctors: int = 10
    score: str | None = None

    def load(self, flow: FlowNetwork, dtype: Dtype) -> ReferenceGuidance:
        """Returns the reference for a network, on its device.

        Args:
            dtype: as load_model's, of the score.

        Raises: EdmDistillError: a picture does not fit.  CheckpointError: a file cannot be read.
        """
        size = flow.img_channels, flow.img_resolution
        return ReferenceGuidance(
            image=read_image(self.image, *size),
            features=load_feature_net(self.feature_net, *size, flow.device),
            weight=self.weight,
            correctors=self.correctors,
            score=None if self.score is None else load_denoiser(self.score, flow.device, dtype),
        )

    def request(self, guidance: ReferenceGuidance) -> dict[str, Any]:
        """Returns what identifies the reference that was loaded, in a request for samples."""
        score = guidance.score and weights_digest(str(self.score), guidance.score)
        return {
            "reference": file_digest(self.image),
            "feature net": file_digest(self.feature_net.removeprefix(MASK)),
            "pull": [self.weight, self.correctors, score],
        }


def read_image(path: Path, channels: int, resolution: int) -> Tensor:
    """Returns a picture of a given size, in grayscale or RGB.  [C,H,W] float32 in [-1, 1]

    Raises: EdmDistillError: it is not a picture, of another size, of more than 8 bits a channel, or partly transparent;
        or the network's images are no pictures.
    """
    if channels not in (1, 3):
        raise EdmDistillError(
            f"{path} is a picture, and this network makes images of {counted(channels, 'channel')}, such as a VAE's "
            "latents: leave --reference out"
        )
    require_no_pipe(path, EdmDistillError)
    try:
        with Image.open(path) as image:
            size = f"{resolution}x{resolution}"
            if image.size != (resolution, resolution):  # before its pixels are read
                its_size = "x".join(map(str, image.size))
                raise EdmDistillError(f"{path} is {its_size}, but the network's images are {size}: resize it first")
            if image.mode not in ("1", "L", "P", "RGB") or image.has_transparency_data:
                raise EdmDistillError(
                    f"{path} has more than 8 bits a channel, transparency, or other colors than gray and RGB (its mode "
                    f"is {image.mode}): save it as a PNG of 8 bits, without transparency"
                )
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EdmDistillError(f"{path} cannot be read as a picture ({error}): use a PNG") from error
    return torch.from_numpy(pixels.reshape(resolution, resolution, channels)).permute(2, 0, 1) / 127.5 - 1


def gray(x: Tensor) -> Tensor:
    """Returns the luma, which colorization keeps.  [B,1 or 3,H,W] -> [B,1,H,W]"""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def load_feature_net(
    name: str, channels: int, resolution: int, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Returns features of images of about [-1, 1]: float32 [B,C,H,W] -> [B,...].

    Args:
        name: identity: all pixels, for strokes; gray: luma, for colorization; mask:FILE: the pixels where a picture is
            white, for inpainting; or a TorchScript file, whose rows depend on their own image alone.
    Raises: EdmDistillError: the picture does not fit.  CheckpointError: the file cannot be read.
    """
    if name == "identity":
        return lambda x: x
    if name == "gray":
        return gray
    if name.startswith(MASK):
        mask = (read_image(Path(name.removeprefix(MASK)), 1, resolution) > 0).to(device)
        return lambda x: x * mask
    return Script(name, device)
