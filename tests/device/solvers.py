"""Sampling on the emulated device, beside the same on the CPU, in a process of its own.

solvers.py '[[kind, preconditioning, options], ...]' prints, of each, the relative distance of its images from those on
the CPU, and the waits of its second batch by cause and line. The kind is teacher, generator, or guided, a generator of
guidance weights; the options are those of `sample`. Of [], it is a pass in training mode.
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


def make_flow(preconditioning: str, dropout: float = 0.0) -> FlowNetwork:
    torch.manual_seed(0)
    kind, arguments = (UNet, NETWORK) if preconditioning == "edm" else (SongUNet, SONG)
    network = kind(8, 1, 10, dropout=dropout, **arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.5)
    return FlowNetwork(network, PRECONDITIONINGS[preconditioning]())


def make_model(kind: str, preconditioning: str) -> Denoiser | Generator:
    flow = make_flow(preconditioning)
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


def compare_dropout() -> dict[str, Any]:
    """A pass in training mode, whose dropout no Draws decides."""
    flow = make_flow("edm", dropout=0.5).train()
    x, t = torch.randn(BATCH, 1, 8, 8), torch.ones(BATCH)

    def passed(flow: FlowNetwork, *inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        F = flow(*inputs)
        assert isinstance(F, torch.Tensor)
        return F.detach()

    expected = passed(flow, x, t)
    with emulated() as log:
        there, inputs = copy.deepcopy(flow).to(DEVICE), (x.to(DEVICE), t.to(DEVICE))
        passed(there, *inputs)  # constants go to the device once
        log.clear()
        found = passed(there, *inputs)
        waits = {f"{cause} {line}": count for (cause, line), count in log.waits.items()}
        distance = float((found.cpu() - expected).norm() / expected.norm())
        del there, inputs, found
    return {"waits": waits, "distance": distance}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(sys.argv[1])
    print(json.dumps([compare(*case) if case else compare_dropout() for case in cases]))
