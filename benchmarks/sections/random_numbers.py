"""What random numbers that belong to rows cost, in percent of a CoSIM round with dropout .1, beside torch's own.

Noise: all of a round's draws, by Draws and by torch.rand and torch.randn. Dropout: its layers in the two passes of a
round that have it, by kernels.dropout and by torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timing import Call, Row, interleaved
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.kernels.dropout import dropout
from sections.growth import cosim

DIGITS = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 32, "channel_mult": [1, 2]}
IMAGENET64 = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 32}
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {"digits": (128, DIGITS), "imagenet64": (1, IMAGENET64)}


def parts(rows: int, arguments: dict[str, Any], device: str) -> dict[str, Call]:
    """Returns calls of a round, of its noise by Draws and by torch, and of its dropout by both."""
    flows, batch, take_round = cosim(rows, arguments | {"dropout": 0.1}, device)

    def noise() -> None:
        for _ in range(2):
            draws = Draws(0, rows, device=device)
            for _ in range(4):
                draws.uniform()
            for _ in range(2):
                draws.normal_like(batch.x0)

    def torchs_noise() -> None:
        for _ in range(2):
            for _ in range(4):
                torch.rand(rows, device=device)
            for _ in range(2):
                torch.randn_like(batch.x0)

    dropped: list[Tensor] = []
    for block in flows["generator"].network.blocks():
        block.conv_res1.register_forward_pre_hook(lambda layer, inputs: dropped.append(inputs[0]))
    with torch.no_grad():
        flows["generator"](batch.x0, torch.ones(rows, device=device))
    features, keys = 2 * dropped, Draws(0, rows, device=device).dropout()

    def masks() -> None:
        for layer, x in enumerate(features):
            dropout(x, 0.1, keys, layer)

    def torchs_masks() -> None:
        for x in features:
            nn.functional.dropout(x, 0.1)

    return {
        "round": take_round,
        "noise": noise,
        "torch's noise": torchs_noise,
        "dropout": masks,
        "torch's dropout": torchs_masks,
    }


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for name, (rows, arguments) in SHAPES.items():
        calls = parts(rows, arguments, options.device)
        times = interleaved(calls, min(options.rounds, 5), options.device)
        shares = {part: f"{100 * np.median(times.of[part]) / np.median(times.of['round']):.2f}%" for part in calls}
        yield {"size": name, "rows": rows} | {part: share for part, share in shares.items() if part != "round"}
