"""FID's Inception-v3 of 2015-12-05: 2048 features and 1008 logits, under two input rules.

Source: Szegedy et al. 2016 (Rethinking the Inception Architecture), as the frozen TensorFlow graph of
inception-2015-12-05.tgz computes it, on which FID and the Inception score are defined.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from edmdistill.checkpoints.store import fill, save_tensors
from edmdistill.errors import CheckpointError
from edmdistill.features.base import FeatureSpace, exact_float32, to_rgb
from edmdistill.features.inception_names import to_our_names
from edmdistill.features.script import load_script
from edmdistill.features.weights import converted, read_weights

EXPECTED = "give inception-2015-12-05.pt, which `edmdistill fetch inception` downloads"
SIZE = 299
"""Height and width of the images that the network takes."""


class FrozenBatchNorm(nn.Module):
    """Batch normalization by the statistics of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return f.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)  # type: ignore[arg-type]


class Conv(nn.Module):
    """A convolution, batch normalization and ReLU.  It keeps the size, unless `pad` is False."""

    def __init__(
        self, channels: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return f.relu(self.bn(self.conv(x)), inplace=True)


def halving(channels: int, out: int) -> Conv:
    """Returns a 3x3 convolution to half the size, without padding."""
    return Conv(channels, out, (3, 3), stride=2, pad=False)


def chain(x: Tensor, *layers: nn.Module) -> Tensor:
    """Applies layers one after another."""
    return reduce(lambda y, layer: layer(y), layers, x)


def average(x: Tensor) -> Tensor:
    """Returns the means of 3x3 pixels, of those inside the image alone, as TensorFlow does.  [B,C,H,W] -> [B,C,H,W]"""
    return f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class MixedA(nn.Module):
    """35x35 pixels: 1x1, 5x5 and two 3x3 convolutions."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64)
        self.branch5x5_1 = Conv(channels, 48)
        self.branch5x5_2 = Conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = Conv(channels, 64)
        self.branch3x3dbl_2 = Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3))
        self.branch_pool = Conv(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        five = chain(x, self.branch5x5_1, self.branch5x5_2)
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat((one, five, three, self.branch_pool(average(x))), 1)


class MixedB(nn.Module):
    """From 35x35 to 17x17 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = halving(channels, 384)
        self.branch3x3dbl_1 = Conv(channels, 64)
        self.branch3x3dbl_2 = Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = halving(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat((self.branch3x3(x), double, f.max_pool2d(x, 3, 2)), 1)


class MixedC(nn.Module):
    """17x17 pixels: 7x7 convolutions as pairs of 1x7 and 7x1."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 192)
        self.branch7x7_1 = Conv(channels, inner)
        self.branch7x7_2 = Conv(inner, inner, (1, 7))
        self.branch7x7_3 = Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(channels, inner)
        self.branch7x7dbl_2 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Conv(inner, 192, (1, 7))
        self.branch_pool = Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat((self.branch1x1(x), seven, double, self.branch_pool(average(x))), 1)


class MixedD(nn.Module):
    """From 17x17 to 8x8 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192)
        self.branch3x3_2 = halving(192, 320)
        self.branch7x7x3_1 = Conv(channels, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = halving(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat((three, seven, f.max_pool2d(x, 3, 2)), 1)


class MixedE(nn.Module):
    """8x8 pixels: paths that end on 1x3 and 3x1 convolutions side by side.

    Args:
        maximum: whether the last path takes maxima, not means: the last block of the TensorFlow graph does.
    """

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Conv(channels, 320)
        self.branch3x3_1 = Conv(channels, 384)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(channels, 448)
        self.branch3x3dbl_2 = Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = f.max_pool2d(x, 3, 1, 1) if self.maximum else average(x)
        return torch.cat(
            (
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ),
            1,
        )


class InceptionV3(nn.Module):
    """The network.  Its tensors carry torchvision's names, as in pytorch-fid's file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = halving(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), pad=False)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, 128)
        self.Mixed_6c = MixedC(768, 160)
        self.Mixed_6d = MixedC(768, 160)
        self.Mixed_6e = MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, maximum=False)
        self.Mixed_7c = MixedE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features before the classifier.  [B,3,299,299] in [-1, 1] -> [B,2048]"""
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = chain(f.max_pool2d(x, 3, 2), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = chain(f.max_pool2d(x, 3, 2), self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        x = chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        return chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c).mean((2, 3))


def _reads_option(script: nn.Module) -> bool:
    """Returns whether a script's forward has NVIDIA's option for features in place of probabilities."""
    schema: Any = script.forward.schema  # type: ignore[attr-defined]
    return any(argument.name == "return_features" for argument in schema.arguments)


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
    num_classes: int | None = 1008

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        given = read_weights(weights, "inception", self.name)
        with torch.device("meta"):
            network = InceptionV3()
        fill(network, to_our_names(given.tensors, network, in_order=given.script), str(given.path))
        self.sha256, self.official = given.sha256, given.official
        self._device = device
        self._net = network.to(device, torch.float32).eval().requires_grad_(False)
        if torch.device(device).type == "cpu":
            self._net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # takes a quarter less time
        if given.script:
            self._prove(given.path)
            save_tensors(converted(given.sha256), self._net.state_dict(), {"source_sha256": given.sha256})

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_rgb(images, self.name).to(self._device)
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
                    f"{path} does not compute features of images as NVIDIA's Inception does: {EXPECTED}."
                ) from error
        if not difference < 1e-4:
            raise CheckpointError(
                f"{path} computes features that differ from Inception's with its weights by {difference:.1e} of the "
                f"largest: {EXPECTED}."
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
