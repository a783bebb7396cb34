"""A forward pass in half precision beside float32: networks of the published sizes, random weights, folded.

Stored: with the weights of convolutions rounded once, as `--dtype` keeps them, over rounding them in each pass.
Difference: of D at sigma = 1, relative (root mean square).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from cases import random_flow
from timing import Row, interleaved
from torch import Tensor

from edmdistill.machine.host import keep_freed_memory
from edmdistill.networks.flow import Denoiser
from sections.cores import NETWORKS


@torch.no_grad()
def denoise(model: Denoiser, x: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    model.flow.compute_dtype = dtype
    D: Tensor = model(x, torch.ones((), device=x.device), labels)
    return D


def measure(options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    if device == "cpu":
        keep_freed_memory()  # as our commands do
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    for name, (arguments, shares) in NETWORKS.items():
        model, stored = (Denoiser(random_flow(*arguments).to(device).eval().requires_grad_(False)) for _ in range(2))
        for each in (model, stored):
            each.flow.network.fold()
        stored.flow.network.store_convolutions(dtype)
        for images in dict.fromkeys((1, *shares, 8)):
            size = images, model.flow.img_channels, *2 * [model.flow.img_resolution]
            x = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
            labels = torch.arange(images, device=device)
            ways = {
                "float32": partial(denoise, model, x, labels, None),
                "rounded": partial(denoise, model, x, labels, dtype),
                "stored": partial(denoise, stored, x, labels, dtype),
            }
            times = interleaved(ways, options.rounds, device)
            exact = ways["float32"]()
            yield {
                "network": name,
                "images": images,
                "dtype": str(dtype).removeprefix("torch."),
                "float32, ms": round(times.ms("float32")),
                "half / float32": times.ratio("stored", "float32"),
                "stored": times.ratio("stored", "rounded"),
                "difference": float((ways["stored"]() - exact).norm() / exact.norm()),
            }
