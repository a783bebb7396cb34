"""A round of each method on the digits, by network and precision.

Round / forward: its CPU time in forward passes of the teacher on the same batch. Engine: what a round takes over the
bare losses and gradients of its turns: data, random numbers, measures, gradients' norm, Adam and average. Traffic: the
bytes that operations read and write. Peak: the most memory in use, the networks' own included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from cases import NETWORKS, digits_run, random_flow, save_teacher
from timing import Row, counted, interleaved, peak_bytes
from torch import nn

from edmdistill.draws import Draws
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.training.loop import rounds
from edmdistill.training.run import Run

BATCH = 16
CASES = (
    *((method, "EDM2", "fp32") for method in METHODS if method != "tcm"),  # it starts from another method's product
    *((method, network, "fp32") for method in ("cosim", "scd") for network in ("DDPM++", "ADM")),
    *((method, "EDM2", "bf16") for method in ("cosim", "scd")),
)


def bare(run: Run) -> None:
    """Computes the losses and gradients of a round, and nothing else."""
    with run.stream() as stream:
        for index, turn in enumerate(run.method.turns()):
            run.set_trainable(turn.role)
            draws = Draws([0, 0, index], BATCH, device=run.engine.device)
            with run.shared_weights():
                turn.loss(stream.read(0, BATCH), draws).value.mean().backward()
            run.networks[turn.role].zero_grad(set_to_none=True)


def held(run: Run) -> int:
    """Returns the bytes of all networks, averages and optimizers' states."""
    networks: list[nn.Module] = [*run.networks.values(), *(average.network for average in run.averages)]
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    adam = [state for optimizer in run.optimizers.values() for state in optimizer.state.values()]
    tensors += [value for state in adam for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_one(method: str, network: str, precision: str, teacher: Path, options: argparse.Namespace) -> Row:
    sets = {"training.batch": BATCH, "training.precision": precision}
    run = digits_run(method, teacher, 10**6, sets, Machine(device=options.device))
    steps, flow = rounds(run), run.networks.get("teacher", run.ema.network)
    take = partial(next, steps)
    for _ in range(2):
        take()
    x, t = torch.randn(BATCH, 1, 8, 8, device=run.engine.device), torch.rand(BATCH, device=run.engine.device)

    @torch.no_grad()
    def forward() -> None:
        flow(x, t)

    times = interleaved(
        {"forward": forward, "bare": partial(bare, run), "round": take}, min(options.rounds, 5), options.device
    )
    peak = peak_bytes(take, options.device)
    return {
        "method": method,
        "network": network,
        "precision": precision,
        "round ms": round(times.ms("round"), 1),
        "round / forward": times.ratio("round", "forward", 1),
        "engine": times.ratio("round", "bare"),
        **counted(take),
        "peak MB": round((peak + (held(run) if options.device == "cpu" else 0)) / 1e6, 1),
    }


def measure(options: argparse.Namespace) -> Iterator[Row]:
    teachers = {}
    for name, (kind, arguments) in NETWORKS.items():
        teachers[name] = save_teacher(random_flow(kind, 8, 1, 10, arguments), options.scratch / f"teacher-{kind}")
    for method, network, precision in CASES:
        yield measure_one(method, network, precision, teachers[network], options)
