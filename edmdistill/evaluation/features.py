"""Feature spaces in which images are compared: uint8 images in, one float32 vector each out.

Every space, FID's Inception as much as the plain pixels, is a class with the interface of `FeatureSpace`; FEATURES lists them.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import ClassVar, Protocol

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.errors import DatasetError


class FeatureSpace(Protocol):
    """What an evaluation needs of a feature space.

    name: as in FEATURES and in the names of metrics.
    dim: number of features d; None where the size of the images decides.
    sha256: of the file of weights; None for a space without weights.
    """

    name: ClassVar[str]
    dim: ClassVar[int | None]
    sha256: str | None

    def __init__(self, device: torch.device | str = "cpu") -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.  uint8 [N,C,H,W] -> float32 [N,d] on the device of the space."""
        ...


class Pixels:
    """The images themselves, v / 127.5 - 1, flattened. For any size, and for checks rather than for judging quality."""

    name: ClassVar[str] = "pixels"
    dim: ClassVar[int | None] = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sha256: str | None = None
        self._device = device

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self._device, torch.float32) / 127.5 - 1).flatten(1)


class DigitsNet(nn.Module):
    """A small convolutional classifier of 8x8 digits; its 64 features before the last layer are the feature space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Features of images in [-1, 1].  [N,1,8,8] -> [N,64]"""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        return functional.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [-1, 1].  [N,1,8,8] -> [N,10]"""
        logits: Tensor = self.head(self.features(x))
        return logits


class Digits:
    """Features of the digits classifier that ships with the package; edmdistill.assets.make_features made its weights."""

    name: ClassVar[str] = "digits"
    dim: ClassVar[int | None] = 64

    def __init__(self, device: torch.device | str = "cpu") -> None:
        weights = files("edmdistill.assets").joinpath("digits-features.safetensors").read_bytes()
        self.sha256: str | None = hashlib.sha256(weights).hexdigest()
        self._device = device
        self._net = DigitsNet()
        self._net.load_state_dict(load(weights))
        self._net.to(device).requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        return self._net.features(self._input(images))

    def classify(self, images: Tensor) -> Tensor:
        """Probabilities of the ten digits.  uint8 [N,1,8,8] -> float32 [N,10]"""
        return self._net(self._input(images)).softmax(1)

    def _input(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            found = "x".join(str(size) for size in images.shape[1:])
            raise DatasetError(
                f"the feature space digits takes 1x8x8 images, got {found}; use the protocol pixels"
            )
        return images.to(self._device, torch.float32) / 127.5 - 1


FEATURES: dict[str, type[FeatureSpace]] = {"pixels": Pixels, "digits": Digits}
