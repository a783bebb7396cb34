"""Feature spaces in which images are compared: uint8 images in, a float32 vector for each out.

FEATURE_SPACES lists them; `load_features` makes one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.arguments import checked
from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.store import fill, load_tensors
from edmdistill.embedded import EMBEDDED, EmbeddedSet
from edmdistill.errors import DatasetError, EdmDistillError, did_you_mean
from edmdistill.features.base import FeatureSpace, require_uint8
from edmdistill.features.dinov2 import DinoV2, DinoV2Dgm
from edmdistill.features.inception import Inception, InceptionPytorchFid
from edmdistill.transfer import require_device


class Pixels(FeatureSpace):
    """The pixels themselves, v / 127.5 - 1, at any size: a check, not a measure of perceived quality."""

    name = "pixels"

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        if weights is not None:
            raise EdmDistillError("the feature space pixels has no weights: leave them out")
        self._device = device

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        require_uint8(images, self.name)
        return (images.to(self._device, torch.float32) / 127.5 - 1).flatten(1), None


class SmallClassifier(nn.Module):
    """A small convolutional classifier of images of an embedded set, with 64 features before its last layer."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        halvings = range((resolution // 4).bit_length() - 1)
        self.strided = [f"conv{2 + i}" for i in halvings]
        for i, name in enumerate(self.strided):
            self.add_module(name, nn.Conv2d(48 if i else 32, 48, 3, padding=1, stride=2))
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [-1, 1] -> [N,64]"""
        x = functional.relu(self.conv1(x))
        for name in self.strided:
            x = functional.relu(self.get_submodule(name)(x))
        return functional.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [-1, 1] -> logits [N,K]"""
        logits: Tensor = self.head(self.features(x))
        return logits


def small_classifier(embedded: EmbeddedSet) -> SmallClassifier:
    """Returns an untrained classifier of the classes of a set."""
    channels, resolution, _ = embedded.shape
    return SmallClassifier(channels, resolution, len(embedded.label_names))


def embedded_space(weights: str | Path) -> str:
    """Returns the name of the embedded set whose classifier has weights of these shapes; where none has, the first.

    Raises: CheckpointError: the file cannot be read.
    """
    shapes = {name: tensor.shape for name, tensor in load_tensors(Path(weights))[0].items()}

    def fits(embedded: EmbeddedSet) -> bool:
        with torch.device("meta"):
            classifier = small_classifier(embedded)
        return shapes == {name: tensor.shape for name, tensor in classifier.state_dict().items()}

    return next((name for name, embedded in EMBEDDED.items() if fits(embedded)), next(iter(EMBEDDED)))


class EmbeddedFeatures(FeatureSpace):
    """Features of the classifier of an embedded set; its weights in assets/ are made by scripts/make_features.py."""

    embedded: EmbeddedSet
    dim: int | None = 64

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        path = weights or self.embedded.features
        tensors = load_tensors(path)[0]
        self.sha256 = sha256_file(path)
        self.official = self.sha256 == sha256_file(self.embedded.features)
        self._device = device
        with torch.device("meta"):  # so that no random number is drawn
            self._net = small_classifier(self.embedded)
        fill(self._net, tensors, str(path))
        # In float64, devices and batch sizes agree to all significant digits.
        self._net.to(device, torch.float64).requires_grad_(False)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B,C,H,W] -> float32 [B,64], float64 [B,K]"""
        features = self._net.features(self._input(images))
        return features.float(), self._net.head(features)

    def _input(self, images: Tensor) -> Tensor:
        require_uint8(images, self.name)
        if images.shape[1:] != self.embedded.shape:
            takes, size = ("x".join(map(str, shape)) for shape in (self.embedded.shape, images.shape[1:]))
            raise DatasetError(
                f"the feature space {self.name} takes {takes} images, not {size}; choose one for such images"
            )
        return images.to(self._device, torch.float64) / 127.5 - 1


def _features_of(embedded: EmbeddedSet) -> type[EmbeddedFeatures]:
    """Returns the feature space of an embedded set."""
    attributes = {"embedded": embedded, "name": embedded.name}
    return type(f"{embedded.name.title()}Features", (EmbeddedFeatures,), attributes)


_SPACES: tuple[type[FeatureSpace], ...] = (Pixels, Inception, InceptionPytorchFid, DinoV2, DinoV2Dgm)
FEATURE_SPACES = {space.name: space for space in (*_SPACES, *map(_features_of, EMBEDDED.values()))}
"""By the name used in protocols and on the command line."""


@checked
def load_features(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureSpace:
    """Returns a feature space, which is called with uint8 [B,C,H,W] and returns float32 [B,d].

    Args:
        name: a key of FEATURE_SPACES: inception, inception-pytorch-fid, dinov2, dinov2-dgm, digits, tiles,
            pixels.
        weights: the file of its weights, or a folder of transformers; None = the official ones, which
            `edmdistill fetch` downloads.
        device: where features are computed.
    Raises:
        EdmDistillError: there is no such space.
        CheckpointError: the weights are not there, are damaged, or are another network's.
    """
    if name not in FEATURE_SPACES:
        raise EdmDistillError(f"there is no feature space {name!r}; {did_you_mean(name, FEATURE_SPACES)}")
    require_device(device)
    return FEATURE_SPACES[name](device, None if weights is None else Path(weights))
