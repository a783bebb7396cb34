"""FID's Inception-v3 of 2015-12-05: 2048 features and 1008 logits, under two input rules.

FID and the Inception score are defined by the frozen TensorFlow graph of inception-2015-12-05.tgz.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from edmdistill.checkpoints.store import fill, save_tensors
from edmdistill.errors import CheckpointError
from edmdistill.features.base import FeatureSpace, exact_float32
from edmdistill.features.inception_names import to_our_names
from edmdistill.features.inception_network import InceptionV3
from edmdistill.features.script import load_script
from edmdistill.features.weights import converted, read_weights

EXPECTED = "give inception-2015-12-05.pt, which `edmdistill fetch inception` downloads"
SIZE = 299
"""Height and width of the images that the network takes."""


def resize_like_tensorflow(x: Tensor) -> Tensor:
    """Resizes bilinearly as TensorFlow 1's resize_bilinear does, whose pixels are points at their upper left corners.

    [B,C,H,W] -> [B,C,299,299]. Pixel i of the output is read at i H / 299, where other libraries read at its center.
    """
    batch, _, height, width = x.shape
    theta = torch.eye(2, 3, device=x.device)
    theta[0, 2] = 1 / width - 1 / SIZE
    theta[1, 2] = 1 / height - 1 / SIZE
    grid = f.affine_grid(theta.expand(batch, -1, -1), [batch, x.shape[1], SIZE, SIZE], align_corners=False)
    return f.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Inception(FeatureSpace):
    """NVIDIA's input rule, that of EDM and EDM2: TensorFlow's resizing to 299 pixels, then (x - 128) / 128.

    Logits leave out the bias of the last layer, as the official Inception score does.
    """

    name = "inception"
    dim: int | None = 2048

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        given = read_weights(weights, "inception", self.name)
        with torch.device("meta"):
            network = InceptionV3()
        tensors = to_our_names(given.tensors, network, in_order=given.script)
        if not tensors.keys() & network.state_dict().keys():
            raise CheckpointError(f"{given.path} does not hold the weights of FID's Inception: {EXPECTED}")
        fill(network, tensors, str(given.path))
        self.sha256, self.official = given.sha256, given.official
        self._device = device
        self._net = network.to(device, torch.float32).eval().requires_grad_(False)
        if torch.device(device).type == "cpu":  # takes a quarter less time
            self._net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
        if given.script:
            self._prove(given.path)
            save_tensors(converted(given.sha256), self._net.state_dict(), {"source_sha256": given.sha256})

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rgb(images).to(self._device)
        with exact_float32():
            features = self._net(self.prepare(x))
            return features, f.linear(features, self._net.fc.weight)

    def _prove(self, path: Path) -> None:
        """Compares features of a random image with those of the TorchScript file that the weights come from.

        Raises: CheckpointError: they differ by more than 1e-4 of the largest, or the script cannot be run.
        """
        image = torch.randint(256, (1, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        script = load_script(path)
        with exact_float32():
            try:
                theirs = script(image, return_features=True) if _reads_option(script) else script(image)
                ours = self._net(Inception.prepare(self, image.to(self._device))).cpu()
                if ours.shape != theirs.shape:
                    raise TypeError(f"features of shape {list(theirs.shape)}")
                difference = float((ours - theirs).abs().max() / theirs.abs().max())
            except (RuntimeError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path} does not compute features of images as NVIDIA's Inception does: {EXPECTED}"
                ) from error
        if not difference < 1e-4:
            raise CheckpointError(
                f"{path} computes features that differ from Inception's with its weights by {difference:.1e} of the "
                f"largest: {EXPECTED}"
            )

    def prepare(self, images: Tensor) -> Tensor:
        """Returns what the network takes.  uint8 [B,3,H,W] -> float32 [B,3,299,299]"""
        return (resize_like_tensorflow(images.float()) - 128) / 128


class InceptionPytorchFid(Inception):
    """pytorch-fid's input rule: bilinear resizing of pixels in [0, 1] to 299, then 2x - 1."""

    name = "inception-pytorch-fid"

    def prepare(self, images: Tensor) -> Tensor:
        x = f.interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return 2 * x - 1


def _reads_option(script: nn.Module) -> bool:
    """Returns whether a script's forward has NVIDIA's option for features in place of probabilities."""
    schema: Any = script.forward.schema  # type: ignore[attr-defined]
    return any(argument.name == "return_features" for argument in schema.arguments)
