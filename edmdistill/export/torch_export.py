"""Exports to torch.export: model.pt2, one network evaluation for any number of images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.export.one_step import MORE_STEPS, OneStep, describe_inputs, example_inputs
from edmdistill.export.parity import Parity, compare, step_sampler
from edmdistill.networks.flow import FlowNetwork

FILE = "model.pt2"


def export_program(step: nn.Module, flow: FlowNetwork) -> ExportedProgram:
    """Returns OneStep as a graph, for any number of images."""
    arguments = example_inputs(flow)
    batch = Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own code
        return torch.export.export(step, (), arguments, dynamic_shapes={name: {0: batch} for name in arguments})


def readme(flow: FlowNetwork, config: CheckpointConfig) -> str:
    return f"""\
`model.pt2` is one network evaluation, for any number of images, as a program that torch runs without any other code:

    import torch
    step = torch.export.load("model.pt2").module()
    x0 = step({", ".join(f"{name}={name}" for name in example_inputs(flow))})

{describe_inputs(flow)}

{MORE_STEPS}
On a GPU: `torch.export.passes.move_to_device_pass(torch.export.load("model.pt2"), "cuda").module()`.
"""


def write(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> tuple[Parity, ...]:
    """Writes FILE and reads it again."""
    step = OneStep(flow.network, flow.preconditioning).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # In memory first: on a full disk, torch's writer ends the process.
        torch.export.save(export_program(step, flow), data := io.BytesIO())
        (folder / FILE).write_bytes(data.getvalue())  # getbuffer(), in an error's traceback, crashes Python 3.12.1
        module = torch.export.load(folder / FILE).module()
    return compare(flow, config, step_sampler(flow, config, module))
