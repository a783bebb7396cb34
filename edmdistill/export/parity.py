"""Checks that an export draws our images: it is sampled as `edmdistill sample` does, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError, counted
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.inputs import Classes, Level, label_vectors, levels
from edmdistill.sampling.generate import require_finite, sample
from edmdistill.trigflow import cos_sin, diffuse, implied_noise, time_to_sigma

Step = Callable[..., Tensor]
"""(OneStep's arguments, by name) -> x0."""

NFE = 1, 2
SEEDS = range(3)
IMAGE_TOLERANCE = 1e-3
"""Largest relative difference of an image. Even the same code and weights round differently with other memory addresses
or vector units: 1e-6 is usual. A network that predicts noise, such as VP's, reaches 1e-4 at its largest noise levels,
because its image is what float32 leaves of x - sigma n."""


class Parity(NamedTuple):
    """The largest difference from our images with `nfe` network evaluations, relative to the largest pixel."""

    nfe: int
    difference: float


class ExportedGenerator(Generator):
    """A generator whose evaluations another program makes."""

    def __init__(self, flow: FlowNetwork, config: CheckpointConfig, step: Step) -> None:
        super().__init__(flow, config)
        self.step = partial(step)  # not as a submodule: an exported program has no train() and eval()

    def jump(
        self,
        x_t: Tensor,
        t: Level,
        s: Level,
        labels: Classes | None = None,
        w: Level | None = None,
    ) -> Tensor:
        t, s = levels(t, "t", len(x_t)), levels(s, "s", len(x_t))
        cos, _ = cos_sin(t, x_t)
        sigma, sigma_next = (time_to_sigma(time, self.flow.sigma_data).float().expand(len(x_t)) for time in (t, s))
        arguments = {"x": x_t / cos, "sigma": sigma}
        if labels is not None:
            arguments["labels"] = label_vectors(labels, self.flow.label_dim, len(x_t)).argmax(1)
        if w is not None:
            arguments["w"] = levels(w, "w", len(x_t)).float().expand(len(x_t))
        if self.flow.two_time:
            arguments["sigma_next"] = sigma_next
        x0 = self.step(**arguments)
        return diffuse(x0, implied_noise(x_t, x0, t), s)


def difference_of(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest pixel."""
    return float((actual - expected).abs().max() / expected.abs().max())


def step_sampler(flow: FlowNetwork, config: CheckpointConfig, step: Step) -> Callable[[int], Tensor]:
    """Returns nfe -> the images that `step` makes from SEEDS, in batches of two and one.  [3,C,H,W]"""
    model = ExportedGenerator(flow, config, step).eval()
    return lambda nfe: sample(model, nfe, seeds=SEEDS, batch=2)


def compare(flow: FlowNetwork, config: CheckpointConfig, images: Callable[[int], Tensor]) -> tuple[Parity, ...]:
    """Compares those images with ours, which the same network makes on the circle.

    Raises: EdmDistillError: they differ by more than IMAGE_TOLERANCE.
    """
    ours = Generator(flow, config).eval()
    rows = []
    for nfe in NFE:
        expected = require_finite(sample(ours, nfe, seeds=SEEDS), SEEDS)
        difference = difference_of(images(nfe), expected)
        if not difference <= IMAGE_TOLERANCE:
            raise EdmDistillError(
                f"nothing was exported: with {counted(nfe, 'network evaluation')}, its images differ from ours by "
                f"{difference:.1e} of the largest pixel, more than {IMAGE_TOLERANCE:g}; please report this"
            )
        rows.append(Parity(nfe, difference))
    return tuple(rows)


def table(parity: Sequence[Parity]) -> str:
    """Returns the parity as text, a line for each number of evaluations, indented as Markdown code."""
    lines = [f"    {row.nfe:>10} {row.difference:>10.1e}" for row in parity]
    return "\n".join([f"    {'nfe':>10} {'difference':>10}", *lines])
