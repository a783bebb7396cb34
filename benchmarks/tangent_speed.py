"""What a tangent costs: FlowNetwork.tangent and torch.func.jvp in forward passes of the same network, in one run.

    python benchmarks/tangent_speed.py [--batch 4] [--rounds 7] [--device cuda --precision fp16 --compile]

Networks of all three kinds with random weights, 32x32 images. Each round times the three one after the other; ratios
are of medians. func.jvp has no derivative of fused attention, so it has MATH.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.training.roles import PRECISION

NETWORKS = {
    "EDM2": ("edm2", {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 2}),
    "DDPM++": ("song", {"model_channels": 64, "channel_mult": [2, 2, 2], "num_blocks": 2}),
    "ADM": ("adm", {"model_channels": 96, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [16]}),
}


def calls(flow: FlowNetwork, batch: int, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """The plain forward pass, ours and torch's, on the same point along the same direction."""
    torch.manual_seed(0)
    x, dx = torch.randn(2, batch, 3, 32, 32, device=device)
    t, dt = torch.rand(2, batch, dtype=torch.float64, device=device)

    def torchs() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(flow, (x, t), (dx, dt))

    ways = {"forward": lambda: flow(x, t), "tangent": lambda: flow.tangent(x, t, None, dx, dt)}
    if compiled:
        flow.network.compile(fullgraph=True)
        return ways
    return ways | {"func.jvp": torchs}


def seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISION, default="fp32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on first use of jvp
    print(f"batch {options.batch}, {options.device}, {torch.get_num_threads()} threads, {options.precision}")
    for name, (kind, arguments) in NETWORKS.items():
        flow = FlowNetwork(new_network(kind, 32, 3, 0, **arguments), EDM(), PRECISION[options.precision])
        flow.network.fold()
        flow.to(options.device).eval().requires_grad_(False)
        ways = calls(flow, options.batch, options.device, options.compile)
        times = [[seconds(call, options.device) for call in ways.values()] for _ in range(options.rounds + 1)]
        median = np.median(times[1:], axis=0)
        ratios = ", ".join(f"{way} {ratio:.2f}" for way, ratio in zip(ways, median / median[0], strict=True))
        parameters = sum(p.numel() for p in flow.parameters()) / 1e6
        print(f"{name}, {parameters:.0f}M parameters: forward takes {1e3 * median[0]:.0f} ms = 1; {ratios}", flush=True)


if __name__ == "__main__":
    main()
