"""A batch that threads of one core each share, beside one thread that draws it with all cores: wall time on a CPU.

One evaluation of networks of the published sizes, random weights. Smaller networks are not shared: see `generate.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from cases import random_flow
from timing import Row, interleaved
from torch import Tensor

from edmdistill.machine.host import cores, keep_freed_memory
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling import generate
from edmdistill.sampling.spec import SamplerSpec

SONG = {"model_channels": 128, "channel_mult": [2, 2, 2], "dropout": 0.0}
NETWORKS: dict[str, tuple[tuple[str, int, int, int, dict[str, Any]], tuple[int, ...]]] = {
    "DDPM++ of CIFAR-10": (("song", 32, 3, 10, SONG), (1, 4)),
    "ADM of ImageNet 64x64": (("adm", 64, 3, 1000, {"model_channels": 192, "dropout": 0.0}), (1,)),
    "EDM2-XS, latents of 64x64": (("edm2", 64, 4, 1000, {"model_channels": 128}), (1,)),
    "EDM2-S, latents of 64x64": (("edm2", 64, 4, 1000, {"model_channels": 192}), (1,)),
}
"""By name: a network, and images for each core."""


def draw(model: Denoiser, images: int, most_cores: int = generate.MOST_CORES) -> Tensor:
    """Draws images in one batch, by threads if there are no more cores than `most_cores`."""
    with patch.object(generate, "MOST_CORES", most_cores):
        return generate.generate_images(model, SamplerSpec(nfe=1), range(images), batch=images)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    if options.device != "cpu" or cores() == 1:
        return
    keep_freed_memory()  # as our commands do
    torch.set_num_threads(cores())
    for name, (arguments, shares) in NETWORKS.items():
        flow = random_flow(*arguments).eval().requires_grad_(False)
        flow.network.fold()
        for share in shares:
            images, model = share * cores(), Denoiser(flow)
            ways = {"shared": partial(draw, model, images), "one": partial(draw, model, images, 1)}
            times = interleaved(ways, options.rounds, wall=True)
            difference = (draw(model, images) - draw(model, images, 1)).abs().max()
            yield {
                "network": name,
                "cores": cores(),
                "images": images,
                "one batch, ms": round(times.ms("one")),
                "shared / one": times.ratio("shared", "one"),
                "difference": float(difference),
            }
    torch.set_num_threads(1)
