"""The interface of feature spaces, and the exact arithmetic that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from edmdistill.arguments import shown
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.kernels.linear import tf32_allowed
from edmdistill.torch_state import torch_as_it_starts


class FeatureSpace(ABC):
    """A rule that gives each image a vector: the resizing of its pixels, and a frozen network.

    Args:
        device: where it computes.
        weights: the file or folder of its weights; None = the official ones.

    Attributes:
        name: its key in FEATURE_SPACES, which is part of the names of metrics.
        dim: the number of features d; None = it depends on the size of the images.
        sha256: of the weights file; None = no weights.
        official: whether these are the official weights, or none are needed: only then may a metric have its plain
            name.
    """

    name: str
    dim: int | None = None
    sha256: str | None = None
    official: bool = True

    @abstractmethod
    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None: ...

    @abstractmethod
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the features and the logits of one forward pass, on the device of the space.

        Args:
            images: uint8 [B,C,H,W]
        Returns: float32 [B,d]; float32 or float64 [B,K], None where the space does not classify.
        Raises: DatasetError: the space does not take such images.
        """

    def rgb(self, images: Tensor) -> Tensor:
        """Returns images as RGB.  uint8 [B,1 or 3,H,W] -> uint8 [B,3,H,W]  Raises: DatasetError: they are not that."""
        require_uint8(images, self.name)
        return to_rgb(images, f"the feature space {self.name}")

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features.  uint8 [B,C,H,W] -> float32 [B,d], on the device of the space

        Raises: DatasetError: the space does not take such images.
        """
        return self.features_and_logits(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits.  uint8 [B,C,H,W] -> float32 or float64 [B,K], on the device of the space

        Raises: EdmDistillError: the space does not classify.  DatasetError: it does not take such images.
        """
        logits = self.features_and_logits(images)[1]
        if logits is None:
            raise EdmDistillError(f"the feature space {self.name} does not classify: choose one with logits, inception")
        return logits


def to_rgb(images: Tensor, what: str, advice: str = "decode latents to images first") -> Tensor:
    """Returns gray or RGB images as RGB, by repeating gray.  [B,1 or 3,H,W] -> [B,3,H,W]

    Args:
        what: that takes them.
        advice: for other images, as the end of a sentence.
    Raises: DatasetError: they are neither, such as a VAE's latents.
    """
    if images.shape[1] not in (1, 3):
        raise DatasetError(f"{what} takes gray or RGB images, [B,1 or 3,H,W], not {shown(images)}: {advice}")
    return images.expand(-1, 3, -1, -1)


def require_uint8(images: object, space: str) -> None:
    """Raises: DatasetError: they are no uint8 [B,C,H,W]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype != torch.uint8:
        raise DatasetError(
            f"the feature space {space} takes images as a tensor, uint8 [B,C,H,W], not {shown(images)}: "
            "torch.from_numpy makes one of an array, sampling.grid.to_uint8 such images of [-1, 1]"
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Computes in float32 as it is: without TF32, autocast and autotuned kernels, which move metrics by hardware."""
    with (
        torch_as_it_starts(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        tf32_allowed(False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield
