"""Sampling by number of function evaluations (NFE), batches of 32 images of 8x8 pixels.

Time: of a batch, in forward passes of the same folded network. Folded: its forward pass over that with weights which
are normalized each time; a sampler folds EDM2's weights by itself.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial

import torch
from cases import NETWORKS, random_flow
from timing import Row, counted, interleaved

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.generate import generate_images
from edmdistill.sampling.spec import SamplerSpec

IMAGES = 32
SOLVERS = {"heun": (7, 35), "dpm-solver++2m": (5, 10), "gamma": (1, 2, 4)}


@torch.no_grad()
def measure(options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    for network, (kind, arguments) in NETWORKS.items():
        plain = random_flow(kind, 8, 1, 10, arguments).to(device).eval()
        flow = copy.deepcopy(plain)
        flow.network.fold()
        config = CheckpointConfig(stage="generator", provenance=Provenance(source="random weights"), **describe(plain))
        x, t = torch.randn(IMAGES, 1, 8, 8, device=device), torch.tensor(0.7, device=device)
        labels = torch.arange(IMAGES, device=device) % 10
        for name, evaluations in SOLVERS.items():
            for nfe in evaluations:
                spec = SamplerSpec(nfe=nfe, solver=None if name == "gamma" else name)
                model = Generator(flow, config) if name == "gamma" else Denoiser(flow)
                draw = partial(generate_images, model, spec, range(IMAGES), labels.cpu())
                ways = {"plain": partial(plain, x, t, labels), "folded": partial(flow, x, t, labels), "sample": draw}
                times = interleaved(ways, min(options.rounds, 3), device)
                yield {
                    "network": network,
                    "sampler": name,
                    "NFE": nfe,
                    "ms an image": round(times.ms("sample") / IMAGES, 3),
                    "time": times.ratio("sample", "folded", 1),
                    "folded": times.ratio("folded", "plain"),
                    **counted(draw),
                }
