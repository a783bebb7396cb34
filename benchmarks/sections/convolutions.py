"""Winograd's convolution of 3x3 beside torch's, channels-last, without gradients, on a CPU in float32.

Errors are root mean squares, relative to that of the result in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as f
from timing import Row, interleaved
from torch import Tensor

from edmdistill.kernels.winograd import pays, transform_weight, winograd_conv2d
from edmdistill.machine.host import keep_freed_memory

IMAGES = 4
LAYERS = (
    *((64, 64, size) for size in (32, 16, 8)),
    (128, 64, 32),
    *((128, 128, size) for size in (32, 16, 8)),
    *((192, 192, size) for size in (64, 16, 8)),
    *((256, 128, size) for size in (32, 16)),
    *((256, 256, size) for size in (32, 16)),
    (384, 192, 8),
    (384, 384, 32),
    (576, 576, 16),
)
"""Channels in and out, and height and width: layers of networks for images of 32x32, of EDM2-S and of benchmarks."""


@torch.no_grad()
def layer(channels: int, out: int, size: int, turns: int) -> Row:
    """Returns Winograd's time over torch's, whether it is chosen, and the errors of both."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    transformed, repeats = transform_weight(weight), 1 + 10**8 // (x.numel() * out)
    exact = f.conv2d(x.double(), weight.double(), padding=1)

    def error(y: Tensor) -> float:
        return float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    calls = {
        "winograd": lambda: [winograd_conv2d(x, transformed) for _ in range(repeats)],
        "torch": lambda: [f.conv2d(x, weight, padding=1) for _ in range(repeats)],
    }
    times = interleaved(calls, turns)
    return {
        "channels in, out": f"{channels}, {out}",
        "size": f"{size}x{size}",
        "torch, ms": round(times.ms("torch") / repeats, 2),
        "Winograd / torch": times.ratio("winograd", "torch"),
        "chosen": "yes" if pays(x, weight) else "no",
        "error": error(winograd_conv2d(x, transformed)),
        "torch's": error(f.conv2d(x, weight, padding=1)),
    }


def measure(options: argparse.Namespace) -> Iterator[Row]:
    if options.device == "cpu":
        keep_freed_memory()  # as our commands do
        yield from (layer(*sizes, options.rounds) for sizes in LAYERS)
