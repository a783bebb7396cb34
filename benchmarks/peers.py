"""CPU time of a denoiser beside NVIDIA's own code, in one run: networks of the same random weights.

    python benchmarks/peers.py [--edm2 CHECKOUT] [--edm CHECKOUT] [--batch 4] [--rounds 15] [--width 64]

CHECKOUT is a clone of NVlabs/edm2 or NVlabs/edm, whose license forbids commercial use. Each round times the two one
after the other, on one thread; the ratio is of medians. Both are as they sample: ours folded, theirs in eval mode. It
prints the range of the rounds, and by how much the images differ.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edmdistill.checkpoints.store import fill
from edmdistill.networks import new_network
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM

SIZE, CLASSES = 32, 10
EDM2 = {"channel_mult": [1, 2, 3], "num_blocks": 2}
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "EDM2": ("edm2", "edm2", 4, EDM2),
    "EDM, DDPM++": ("edm", "song", 3, {"channel_mult": [2, 2, 2], "num_blocks": 2}),
    "EDM, ADM": ("edm", "adm", 3, {"channel_mult": [1, 2, 2], "num_blocks": 2}),
}
"""By label: the checkout, our kind of network, channels of images, and arguments of the network."""


def official(checkout: Path, module: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    """A network of the checkout, in eval mode."""
    for known in [known for known in sys.modules if known.split(".")[0] in ("training", "torch_utils", "dnnlib")]:
        del sys.modules[known]  # both checkouts have modules of these names
    sys.path.insert(0, str(checkout))
    try:
        return getattr(importlib.import_module(module), name)(**arguments).eval().requires_grad_(False)
    finally:
        sys.path.remove(str(checkout))


def pair(label: str, checkout: Path, width: int) -> tuple[nn.Module, Denoiser]:
    """Their network and ours, with the same weights; those that start at 0 are random."""
    torch.manual_seed(0)
    peer, kind, channels, inner = CASES[label]
    images = {"img_resolution": SIZE, "img_channels": channels, "label_dim": CLASSES}
    arguments = images | inner | {"model_channels": width}
    if peer == "edm2":
        theirs, prefix = official(checkout, "training.networks_edm2", "Precond", arguments), "unet."
    else:
        model_type = {"song": "SongUNet", "adm": "DhariwalUNet"}[kind]
        theirs = official(checkout, "training.networks", "EDMPrecond", arguments | {"model_type": model_type})
        prefix = "model."
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    with torch.device("meta"):
        network = new_network(kind, **arguments)
    state = {name.removeprefix(prefix): tensor.clone() for name, tensor in theirs.state_dict().items()}
    fill(network, {name: tensor for name, tensor in state.items() if name in network.state_dict()}, label)
    network.fold()
    return theirs, Denoiser(FlowNetwork(network, EDM()).eval().requires_grad_(False))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("edm2", "edm"):
        parser.add_argument(f"--{peer}", type=Path)
    for name, default in (("batch", 4), ("rounds", 15), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for label, (peer, *_) in CASES.items():
        checkout = getattr(options, peer)
        if checkout is None:
            continue
        theirs, ours = pair(label, checkout, options.width)
        x = torch.randn(options.batch, ours.img_channels, SIZE, SIZE)
        sigma, labels = torch.full((options.batch,), 2.5), torch.eye(CLASSES)[torch.arange(options.batch) % CLASSES]
        times = []
        for _ in range(options.rounds + 1):
            images, row = [], []
            for network in (theirs, ours):
                start = time.process_time()
                images.append(network(x, sigma, labels))
                row.append(time.process_time() - start)
            times.append(row)
        was, now = np.median(times[1:], axis=0)
        ratios = np.array(times[1:])[:, 1] / np.array(times[1:])[:, 0]
        print(
            f"{label}: theirs {1e3 * was:.1f} ms, ours {1e3 * now:.1f} ms, ratio {now / was:.2f} "
            f"({ratios.min():.2f} to {ratios.max():.2f}), largest difference {(images[0] - images[1]).abs().max():.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
