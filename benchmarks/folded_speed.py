"""What folding EDM2's weights saves of a forward pass, and what it changes: both networks in one run.

    python benchmarks/folded_speed.py [--batches 1 4] [--rounds 7] [--device cuda --precision fp16]

Random weights and gains: EDM2-S of 64x64 pixels, and a network of the digits' size. Each round times the two one after
the other; the ratio is of medians.
"""

import argparse
import copy

import numpy as np
import torch
from tangent_speed import seconds

from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.magnitude import GAIN_LAYERS
from edmdistill.networks.preconditioning import EDM
from edmdistill.training.roles import PRECISION

SMALL = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": []}
NETWORKS = {"EDM2-S, 64x64": (64, 1000, {}), "small, 8x8": (8, 10, SMALL)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISION, default="fp32")
    options = parser.parse_args()
    print(f"{options.device}, {torch.get_num_threads()} threads, {options.precision}")
    for name, (size, classes, arguments) in NETWORKS.items():
        torch.manual_seed(0)
        network = UNet(size, 3, classes, **arguments)
        for parameter, value in network.named_parameters():
            if parameter.rpartition(".")[2] in GAIN_LAYERS:
                value.fill_(0.5)
        plain = FlowNetwork(network, EDM(), PRECISION[options.precision]).to(options.device).eval()
        folded = copy.deepcopy(plain)
        folded.network.fold()
        for batch in options.batches:
            x = torch.randn(batch, 3, size, size, device=options.device)
            sigma = torch.tensor(2.5, device=options.device)
            ways = [lambda f=flow, x=x, s=sigma: Denoiser(f)(x, s) for flow in (plain, folded)]
            was, now = (way() for way in ways)
            times = [[seconds(way, options.device) for way in ways] for _ in range(options.rounds + 1)]
            unfolded, quick = np.median(times[1:], axis=0)
            print(
                f"{name}, batch {batch}: unfolded {1e3 * unfolded:.1f} ms, folded {1e3 * quick:.1f} ms, "
                f"ratio {quick / unfolded:.2f}, largest difference {float((was - now).abs().max()):.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
