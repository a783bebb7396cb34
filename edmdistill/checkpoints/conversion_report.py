"""Reports of conversions: the checkpoint, and by how much it differs from its source."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.noise_dependence import describe_dependence
from edmdistill.errors import counted, printable


class ParityRow(NamedTuple):
    """The largest difference between a checkpoint and its source at a noise level, relative to the largest pixel.

    float64 is None where it was not measured.
    """

    sigma: float
    float32: float
    float64: float | None


class ConversionReport(NamedTuple):
    """The checkpoint that `convert` wrote, or that was there already; no parity where none was measured."""

    path: Path
    config: CheckpointConfig
    parity: tuple[ParityRow, ...]
    written: bool = True

    def document(self) -> dict[str, Any]:
        """Returns the report as msgspec encodes it to JSON."""
        parity = [row._asdict() for row in self.parity]
        return {"schema_version": 1, "path": str(self.path), "config": self.config, "parity": parity}

    def describe(self, source: str) -> str:
        """Returns the report as text.  source: as the user named it, printable and without secrets."""
        if not self.written:
            return f"{self.path} holds the conversion of {source} already: nothing was done."
        config = self.config
        network, licence, origin = config.network, config.provenance.licence, printable(config.provenance.source)
        size, of = network.arguments["img_resolution"], "latents" if config.latent else "pixels"
        lines = [
            f"{origin}: {network.kind}, {size}x{size} {of}, {counted(config.label_dim, 'class')}, preconditioned as "
            f"{config.preconditioning['kind']}.",
        ]
        if self.parity:
            what = "Largest relative difference of its denoised images after the conversion"
            lines.append(f"{what}:\n\n{table(self.parity)}\n")
        if config.noise_dependence is not None:
            lines.append(describe_dependence(config.noise_dependence))
        under = f"under the licence {licence}" if licence else "under no known licence (--licence names one)"
        lines.append(f"{self.path} is written: a teacher in TrigFlow, {under}.")
        if network.arguments.get("positional_time"):
            lines += [
                "It is another function than its source. To train it on, and to see whether it is as good again:",
                f"  edmdistill train diffusion {shlex.quote(str(self.path))} --data DATA --recipe RECIPE --run-dir RUN",
                f"  edmdistill loss RUN {shlex.quote(source)} --data DATA",
            ]
        return "\n".join(lines)


class GeneratorReport(NamedTuple):
    """The checkpoint of a published generator that `convert_generator` wrote."""

    path: Path
    config: CheckpointConfig

    def document(self) -> dict[str, Any]:
        """Returns the report as msgspec encodes it to JSON."""
        return {"schema_version": 1, "path": str(self.path), "config": self.config}

    def describe(self, source: str) -> str:
        """Returns the report as text.  source: as the user named it, printable and without secrets."""
        config, network = self.config, self.config.network
        return (
            f"{source}: {network.kind}, {network.arguments['img_resolution']}x{network.arguments['img_resolution']}, "
            f"{counted(config.label_dim, 'class')}, a generator by {config.method} that starts at sigma "
            f"{config.sigma_max:g}.\n"
            f"{self.path} is written, for sample, eval and compare, under the licence {config.provenance.licence}."
        )


def table(parity: Sequence[ParityRow]) -> str:
    """Returns the parity as text, a line for each noise level, indented as Markdown's code."""
    columns = ["sigma", "float32"] + ["float64"] * (parity[0].float64 is not None)
    lines = [
        f"    {row.sigma:>10.4g}" + "".join(f" {error:>10.1e}" for error in row[1 : len(columns)]) for row in parity
    ]
    return "\n".join(["    " + " ".join(f"{name:>10}" for name in columns), *lines])
