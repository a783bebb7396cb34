"""Feature spaces in which images are compared: uint8 images in, a float32 vector for each out.

Each is a class with the interface FeatureSpace; FEATURE_SPACES lists them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.checkpoints.store import fill, load_tensors
from edmdistill.errors import DatasetError

DIGITS_WEIGHTS = Path(__file__).parents[1] / "assets" / "digits-features.safetensors"


class FeatureSpace(Protocol):
    """The interface of feature spaces.

    Attributes:
        name: its key in FEATURE_SPACES, which is part of the names of metrics.
        dim: the number of features d; None = it depends on the size of the images.
        sha256: of the weights file; None = no weights.
        official: whether the weights are those that the space is known by.
    """

    name: str
    dim: int | None
    sha256: str | None
    official: bool

    def __init__(self, device: torch.device | str = "cpu") -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features.  uint8 [N,C,H,W] -> float32 [N,d], on the device of the space

        Raises: DatasetError: the space does not support images of this size.
        """
        ...


@runtime_checkable
class Classifier(Protocol):
    """A feature space that also classifies."""

    def classify(self, images: Tensor) -> Tensor:
        """uint8 [N,C,H,W] -> probabilities, float32 [N,classes]."""
        ...


class Pixels:
    """The pixels themselves, v / 127.5 - 1, at any size: a check, not a measure of perceived quality."""

    name = "pixels"
    dim: int | None = None
    sha256: str | None = None
    official = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self._device, torch.float32) / 127.5 - 1).flatten(1)


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


class Digits:
    """Features of a classifier of 8x8 digits; its weights in assets/ are made by scripts/make_features.py.

    Args:
        weights: file with other weights of the same layers.
    """

    name = "digits"
    dim: int | None = 64
    sha256: str | None

    def __init__(self, device: torch.device | str = "cpu", weights: Path = DIGITS_WEIGHTS) -> None:
        tensors = load_tensors(weights)[0]
        self.sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.official = weights == DIGITS_WEIGHTS
        self._device = device
        self._net = DigitsNet()
        fill(self._net, tensors, str(weights))
        # In float64, devices and batch sizes agree to all significant digits.
        self._net.to(device, torch.float64).requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        return self._net.features(self._input(images)).float()

    def classify(self, images: Tensor) -> Tensor:
        """uint8 [N,1,8,8] -> probabilities of the ten digits, float32 [N,10]."""
        return functional.softmax(self.logits(images), 1).float()

    def logits(self, images: Tensor) -> Tensor:
        """uint8 [N,1,8,8] -> float64 [N,10]"""
        logits: Tensor = self._net(self._input(images))
        return logits

    def _input(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            found = "x".join(map(str, images.shape[1:]))
            raise DatasetError(f"the feature space digits takes 1x8x8 images, not {found}; choose the protocol pixels")
        return images.to(self._device, torch.float64) / 127.5 - 1


FEATURE_SPACES: dict[str, type[FeatureSpace]] = {"pixels": Pixels, "digits": Digits}
