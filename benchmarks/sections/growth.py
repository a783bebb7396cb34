"""How the losses and gradients of a CoSIM round grow, of EDM2 with random weights: by batch, resolution and channels.

Time: over that of the row above. Products: the multiplications of its convolutions, linear maps and attention, over
those of the row above. Peak: the most memory of activations and gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from timing import Call, Row, interleaved, peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, CoSIMConfig
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM

START = {"batch": 4, "resolution": 8, "channels": 32}
SERIES = {"batch": (4, 16, 64), "resolution": (8, 16, 32), "channels": (32, 64, 128)}


def cosim(rows: int, arguments: dict[str, Any], device: str) -> tuple[dict[str, FlowNetwork], Batch, Call]:
    """Returns CoSIM's networks, a batch, and a call of both turns' losses and gradients."""
    roles = ("teacher", "generator", "auxiliary")
    flows = {r: FlowNetwork(UNet(**arguments, two_time=r == "auxiliary"), EDM()).to(device) for r in roles}
    turns = CoSIM(CoSIMConfig(), flows, NoiseRange(0.5, 0.002, 80.0)).turns()
    size = arguments["img_resolution"]
    batch = Batch(torch.zeros(rows, arguments["img_channels"], size, size, device=device), None)

    def take_round() -> None:
        for turn in turns:
            for role, flow in flows.items():
                flow.train(role == turn.role).requires_grad_(role == turn.role)
            draws = flows[turn.role].draws = Draws(0, rows, device=device)
            turn.loss(batch, draws).value.mean().backward()
            flows[turn.role].zero_grad(set_to_none=True)

    return flows, batch, take_round


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for name, values in SERIES.items():
        rows, calls = [], {}
        for value in values:
            case = START | {name: value}
            network = {"img_resolution": case["resolution"], "img_channels": 1, "label_dim": 0, "num_blocks": 1}
            network |= {"model_channels": case["channels"], "channel_mult": [1, 2], "attn_resolutions": []}
            flows, _, calls[str(value)] = cosim(case["batch"], network, options.device)
            with FlopCounterMode(display=False) as counter:
                calls[str(value)]()
            parameters = sum(p.numel() for p in flows["generator"].parameters())
            products, peak = counter.get_total_flops() / 2, peak_bytes(calls[str(value)], options.device)
            rows.append(case | {"parameters": f"{parameters / 1e6:.2f}M", "G products": products / 1e9})
            rows[-1]["peak MB"] = round(peak / 1e6, 1)
        times = interleaved(calls, min(options.rounds, 5), options.device)
        for index, (value, row) in enumerate(zip(values, rows, strict=True)):
            before = rows[index - 1]
            row["time"] = times.ratio(str(value), str(values[index - 1])) if index else "1"
            row["products"] = round(row["G products"] / before["G products"], 2) if index else 1
            yield row
