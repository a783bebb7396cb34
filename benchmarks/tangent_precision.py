"""How much of the rearranged tangent, cos(t) sin(t) dF/dt, the precisions keep, by t: a table in Markdown.

    python benchmarks/tangent_precision.py [--batch 4] [--device cuda]

Relative L2 error to float64 along x_t = cos(t) x0 + sin(t) z. The trained teacher of digits that ships with the
package, and small networks of every kind with random weights.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor

import edmdistill
from edmdistill.checkpoints.official import load_official
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.training.roles import PRECISION
from edmdistill.trigflow import diffuse, expand, velocity

NETWORKS = {
    "EDM2": ("edm2", {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2}),
    "DDPM++": ("song", {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [8]}),
    "ADM": ("adm", {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [8]}),
}
TIMES = (0.004, 0.02, 0.1, 0.4, 0.8, 1.2, math.pi / 2 - 0.1, math.pi / 2 - 0.02, math.pi / 2 - 0.0063)


def random_network(kind: str, arguments: dict[str, object]) -> FlowNetwork:
    """For 16x16 images; what starts at 0 or nearly, but the biases, is drawn larger."""
    torch.manual_seed(0)
    network = new_network(kind, 16, 3, 0, **arguments)
    for parameter in network.parameters():
        if parameter.ndim != 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5) if parameter.ndim else parameter.fill_(1)
    return FlowNetwork(network, EDM())


def tangent(flow: FlowNetwork, t: float, batch: int, device: str) -> Tensor:
    """cos(t) sin(t) dF/dt at points that are the same for every precision."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, batch, flow.img_channels, flow.img_resolution, flow.img_resolution
    x0, z = flow.sigma_data * torch.randn(shape, generator=generator).to(device)
    time = torch.full((batch,), t, dtype=torch.float64, device=device)
    r = time.cos() * time.sin()
    return flow.tangent(diffuse(x0, z, time), time, None, expand(r, x0).to(x0.dtype) * velocity(x0, z, time), r)[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    flows = {"digits": load_official(Path(edmdistill.__file__).parent / "assets/digits-teacher.pkl")[0]}
    flows |= {name: random_network(*how) for name, how in NETWORKS.items()}
    columns, errors = [], []
    for name, flow in flows.items():
        flow.to(options.device).eval().requires_grad_(False)
        truth = [tangent(copy.deepcopy(flow).double(), t, options.batch, options.device) for t in TIMES]
        for precision, flow.compute_dtype in PRECISION.items():
            tangents = [tangent(flow, t, options.batch, options.device).double() for t in TIMES]
            columns.append(f"{name} {precision}")
            errors.append([float((a - b).norm() / b.norm()) for a, b in zip(tangents, truth, strict=True)])
    print(f"| t | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for t, row in zip(TIMES, zip(*errors, strict=True), strict=True):
        print(f"| {t:.4f} | {' | '.join(f'{error:.1e}' for error in row)} |")


if __name__ == "__main__":
    main()
