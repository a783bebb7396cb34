"""Feature spaces in which images are compared: uint8 images in, a float32 vector for each out.

FEATURE_SPACES lists them; `load_features` makes one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.store import fill, load_tensors
from edmdistill.errors import DatasetError, EdmDistillError, did_you_mean
from edmdistill.features.base import FeatureSpace
from edmdistill.features.dinov2 import DinoV2, DinoV2Dgm
from edmdistill.features.inception import Inception, InceptionPytorchFid

DIGITS_WEIGHTS = Path(__file__).parents[1] / "assets" / "digits-features.safetensors"


class Pixels(FeatureSpace):
    """The pixels themselves, v / 127.5 - 1, at any size: a check, not a measure of perceived quality."""

    name = "pixels"

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        if weights is not None:
            raise EdmDistillError("the feature space pixels has no weights: leave them out")
        self._device = device

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        return (images.to(self._device, torch.float32) / 127.5 - 1).flatten(1), None


class DigitsNet(nn.Module):
    """A small convolutional classifier of 8x8 digits, with 64 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """[N,1,8,8] in [-1, 1] -> [N,64]"""
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(x))
        return functional.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N,1,8,8] in [-1, 1] -> logits [N,10]"""
        logits: Tensor = self.head(self.features(x))
        return logits


class Digits(FeatureSpace):
    """Features of a classifier of 8x8 digits; its weights in assets/ are made by scripts/make_features.py."""

    name = "digits"
    dim: int | None = 64
    num_classes: int | None = 10

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        path = weights or DIGITS_WEIGHTS
        tensors = load_tensors(path)[0]
        self.sha256 = sha256_file(path)
        self.official = self.sha256 == sha256_file(DIGITS_WEIGHTS)
        self._device = device
        self._net = DigitsNet()
        fill(self._net, tensors, str(path))
        # In float64, devices and batch sizes agree to all significant digits.
        self._net.to(device, torch.float64).requires_grad_(False)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B,1,8,8] -> float32 [B,64], float64 [B,10]"""
        features = self._net.features(self._input(images))
        return features.float(), self._net.head(features)

    def classify(self, images: Tensor) -> Tensor:
        """uint8 [B,1,8,8] -> probabilities of the ten digits, float32 [B,10]"""
        return functional.softmax(self.logits(images), 1).float()

    def _input(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            size = "x".join(map(str, images.shape[1:]))
            raise DatasetError(f"the feature space digits takes 1x8x8 images, not {size}; choose the protocol pixels")
        return images.to(self._device, torch.float64) / 127.5 - 1


FEATURE_SPACES: dict[str, type[FeatureSpace]] = {
    space.name: space for space in (Pixels, Digits, Inception, InceptionPytorchFid, DinoV2, DinoV2Dgm)
}
"""By the name used in protocols and on the command line."""


def load_features(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureSpace:
    """Returns a feature space, which is called with uint8 [B,C,H,W] and returns float32 [B,d].

    Args:
        name: a key of FEATURE_SPACES: inception, inception-pytorch-fid, dinov2, dinov2-dgm, digits, pixels.
        weights: the file of its weights, or a folder of transformers; None = the official ones, which
            `edmdistill fetch` downloads.
        device: where features are computed.
    Raises:
        EdmDistillError: there is no such space.
        CheckpointError: the weights are not there, are damaged, or are another network's.
    """
    if name not in FEATURE_SPACES:
        raise EdmDistillError(f"there is no feature space {name!r}; {did_you_mean(name, FEATURE_SPACES)}")
    return FEATURE_SPACES[name](device, None if weights is None else Path(weights))
