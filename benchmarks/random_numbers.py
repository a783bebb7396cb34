"""What random numbers that belong to rows cost in a round of CoSIM, beside torch's own in the same run.

    python benchmarks/random_numbers.py [--device cuda] [--repeats 20]

Round: both turns' forward and backward passes, with dropout .1. Noise: all of a round's draws, by Draws and by
torch.rand and torch.randn. Dropout: its layers in the two passes of a round that have it, by kernels.dropout and by
torch's. Each is the least time of the repeats, and a share of the round.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from edmdistill.draws import Draws
from edmdistill.kernels.dropout import dropout
from edmdistill.methods import METHODS
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIMConfig
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM

DIGITS = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 32, "channel_mult": [1, 2]}
IMAGENET64 = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 64}
SHAPES = {"digits": (256, DIGITS), "imagenet64": (2, IMAGENET64)}


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Returns the least time of some calls."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measured(rows: int, arguments: dict, device: torch.device, repeats: int) -> list[float]:
    """Returns the seconds of a round, of its noise twice, and of its dropout twice."""
    flows = {
        role: FlowNetwork(UNet(**arguments, dropout=0.1, two_time=role == "auxiliary"), EDM()).to(device)
        for role in ("teacher", "generator", "auxiliary")
    }
    turns = METHODS["cosim"](CoSIMConfig(), flows, NoiseRange(0.5, 0.002, 80.0)).turns()
    size = arguments["img_resolution"]
    batch = Batch(torch.zeros(rows, arguments["img_channels"], size, size, device=device), None)

    def take_round() -> None:
        for turn in turns:
            for role, flow in flows.items():
                flow.train(role == turn.role).requires_grad_(role == turn.role)
            draws = flows[turn.role].draws = Draws(0, rows, device=device)
            turn.loss(batch, draws).value.mean().backward()

    def noise() -> None:
        for _ in turns:
            draws = Draws(0, rows, device=device)
            for _ in range(4):
                draws.uniform()
            for _ in range(2):
                draws.normal_like(batch.x0)

    def torchs_noise() -> None:
        for _ in turns:
            for _ in range(4):
                torch.rand(rows, device=device)
            for _ in range(2):
                torch.randn_like(batch.x0)

    dropped: list[torch.Tensor] = []
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

    parts = noise, torchs_noise, masks, torchs_masks
    return [seconds(take_round, 3, device), *(seconds(part, repeats, device) for part in parts)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    for name, (rows, arguments) in SHAPES.items():
        whole, *parts = measured(rows, arguments, options.device, options.repeats)
        shares = [f"{1e3 * part:.2f} ms ({part / whole:.2%})" for part in parts]
        print(f"{name}, {rows} rows: a round {whole:.2f} s; noise {shares[0]}, torch's {shares[1]}; ", end="")
        print(f"dropout {shares[2]}, torch's {shares[3]}", flush=True)


if __name__ == "__main__":
    main()
