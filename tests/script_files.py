"""Networks of the user's, as TorchScript files hold them."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from edmdistill.features.perceptual import NUM_MAPS


class Maps(nn.Module):
    """Feature maps, as ScriptFeatures wants them."""

    def __init__(self, count: int = NUM_MAPS) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3, padding=1)
        self.count = count

    def forward(self, x: Tensor) -> list[Tensor]:
        y = nn.functional.avg_pool2d(self.layer(x), 28)
        return [nn.functional.avg_pool2d(y, 2**level) for level in range(self.count)]


class Gap(nn.Module):
    """A distance of no parameters, as PerceptualDistance wants it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def script(module: nn.Module, path: Path, *like: Tensor) -> str:
    """Writes it as TorchScript, as it runs on `like`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, like), str(path))
    return str(path)
