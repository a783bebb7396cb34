"""Exports to ONNX: model.onnx, one network evaluation for any number of images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.export.one_step import MORE_STEPS, OneStep, describe_inputs, example_inputs
from edmdistill.export.parity import Parity, compare, step_sampler
from edmdistill.export.torch_export import export_program
from edmdistill.networks.flow import FlowNetwork
from edmdistill.optional import importing

FILE = "model.onnx"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of torch's exporter about itself and torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*The axis name: batch will not be used")  # it is, once
            yield
    finally:
        logger.setLevel(level)


def check_installed() -> None:
    """Raises: EdmDistillError: a package cannot be imported."""
    needed = partial(importing, extra="onnx", needed_by="--to onnx needs")
    with _quiet():
        with needed("onnx"):
            import onnx  # noqa: F401
        with needed("onnxruntime"):
            import onnxruntime  # noqa: F401
        with needed("onnxscript"):
            import onnxscript  # noqa: F401


def readme(flow: FlowNetwork, config: CheckpointConfig) -> str:
    feed = ", ".join(f'"{name}": {name}' for name in example_inputs(flow))
    return f"""\
`model.onnx` is one network evaluation, for any number of images. With ONNX Runtime and numpy arrays:

    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    (x0,) = session.run(None, {{{feed}}})

{describe_inputs(flow)}

{MORE_STEPS}"""


def write(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> tuple[Parity, ...]:
    """Writes FILE and runs it; weights of more than 2 GB, which the format cannot hold, go into FILE.data."""
    import onnxruntime

    step = OneStep(flow.network, flow.preconditioning).eval()
    names = list(example_inputs(flow))
    with _quiet():
        done = torch.onnx.export(
            export_program(step, flow),
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=["x0"],
            dynamic_shapes={name: {0: "batch"} for name in names},  # the program does not keep the name of its Dim
        )
        assert done is not None
        done.save(folder / FILE)
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def call(**arguments: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in arguments.items()})[0])

    return compare(flow, config, step_sampler(flow, config, call))
