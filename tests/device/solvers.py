"""Sampling on the emulated device, beside the same on the CPU, in a process of its own.

solvers.py '[[kind, preconditioning, options], ...]' prints, of each, the relative distance of its images from those on
the CPU, and the waits of its second batch by cause and line. The kind is teacher, generator, or guided, a generator of
guidance weights; the options are those of `sample`.
"""

import copy
import json
import sys
from typing import Any

import torch
from emulated_device import DEVICE, emulated
from toy_runs import NETWORK

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS
from edmdistill.networks.song import SongUNet
from edmdistill.networks.surgery.rebuild import add_guidance
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.sampling.generate import sample
from edmdistill.sampling.heun import Churn

BATCH = 2
SONG = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}


def make_model(kind: str, preconditioning: str) -> Denoiser | Generator:
    torch.manual_seed(0)
    network = UNet(8, 1, 10, **NETWORK) if preconditioning == "edm" else SongUNet(8, 1, 10, **SONG)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    flow = FlowNetwork(network, PRECONDITIONINGS[preconditioning]())
    if kind == "teacher":
        return Denoiser(flow)
    flow = add_guidance(flow) if kind == "guided" else add_second_time(flow)
    guidance = Guidance("classes", (1.0, 3.0)) if kind == "guided" else None
    config = CheckpointConfig(
        stage="generator", method="ctm", guidance=guidance, provenance=Provenance(source="a test"), **describe(flow)
    )
    return Generator(flow, config)


def compare(kind: str, preconditioning: str, options: dict[str, Any]) -> dict[str, Any]:
    model = make_model(kind, preconditioning).requires_grad_(False)
    if "churn" in options:
        options = options | {"churn": Churn(*options["churn"])}
    expected = sample(model, seeds=range(2 * BATCH), batch=BATCH, **options)
    with emulated() as log:
        there = copy.deepcopy(model).to(DEVICE)
        found = sample(there, seeds=range(2 * BATCH), batch=BATCH, **options)
        log.clear()
        sample(there, seeds=range(BATCH), **options)
        waits = {f"{cause} {line}": count for (cause, line), count in log.waits.items()}
        kernels = sum(log.kernels.values())
        del there
    return {"waits": waits, "kernels": kernels, "distance": float((found - expected).norm() / expected.norm())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([compare(*case) for case in json.loads(sys.argv[1])]))
