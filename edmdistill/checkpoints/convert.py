"""Converts official checkpoints, NVIDIA's pickles or OpenAI's weights, to networks on the TrigFlow circle.

A conversion must keep the function: `convert` compares what it has written with its source, and fails if they differ.
Where it is asked to change the network (`networks.surgery.adapt`), it reports how much the function has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec.structs import replace

from edmdistill.arguments import checked
from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.config import CheckpointConfig, describe, read_config
from edmdistill.checkpoints.conversion_report import ConversionReport, ParityRow, table
from edmdistill.checkpoints.layout import CARD, CONFIG
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.load import read_teacher
from edmdistill.checkpoints.noise_dependence import noise_dependence
from edmdistill.checkpoints.official import load_official
from edmdistill.checkpoints.parity import Parity, compare, denoised_images, plan_comparison
from edmdistill.checkpoints.source import Source, open_source, source_name
from edmdistill.checkpoints.store import describe_checkpoint, load_checkpoint, refuse_occupied, write_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks.surgery.adapt import can_double_norm, with_double_norm, with_positional_time
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time

PARITY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
"""Largest relative difference that a conversion may make; 1e-5 and 1e-12 are usual."""


def _adaptation(time_embedding: str | None, double_norm: bool | None, arguments: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the arguments that a conversion sets, where a network with `arguments` has them."""
    if time_embedding is None:
        return {name: False for name in ("positional_time", "double_norm") if name in arguments}
    default = can_double_norm(arguments)
    asked = default if double_norm is None else double_norm
    return {"positional_time": True} | ({"double_norm": asked} if default or asked else {})


@checked
def convert(
    source: str | Path | Source,
    out: str | Path,
    *,
    time_embedding: Literal["positional"] | None = None,
    double_norm: bool | None = None,
    overwrite: bool = False,
    licence: str | None = None,
    parity: Parity = "quick",
    on_progress: Callable[[str], object] = lambda stage: None,
) -> ConversionReport:
    """Converts an official checkpoint to one of ours, with a second time, and proves that it is the same function.

    The written checkpoint, read again, is compared on the circle with the source in EDM's view. If the same source has
    been converted to `out` before, with that licence, nothing is done.

    Args:
        source: a path, a URL or a file of the Hub; see `resolve`.
        out: the folder to write, whole or not at all.
        time_embedding: positional: the network is to read t, for continuous-time consistency models. That is another
            function, to be trained by `edmdistill train diffusion`; the source may then be a teacher of ours.
        double_norm: adaptive double normalization, with a positional time embedding; None: where the network has an
            adaptive norm.
        overwrite: replace an existing checkpoint.
        licence: of the weights, see check_licence; default: that of NVIDIA's or OpenAI's weights.
        parity: full: compares on images of the network's size at 8 noise levels, in float32 and float64; quick: on the
            smallest images that use every weight, and for networks of more than SMALL parameters at 2 noise levels in
            float32 alone; none: does not compare.
        on_progress: called with a phrase at every step.
    Raises: CheckpointError: the source cannot be read or adapted, `out` is occupied, or the result differs.
    """
    if double_norm is not None and time_embedding is None:
        raise CheckpointError(
            "--double-norm and --no-double-norm need --time-embedding positional: give both, or neither"
        )
    licence = None if licence is None else check_licence(licence)
    source, out = open_source(source), Path(out)
    adapts = source.path.is_dir() and time_embedding is not None  # other folders need no conversion
    if adapts and out.resolve().is_relative_to(source.path.resolve()):
        raise CheckpointError(f"{out} is inside the folder that is converted, {source.path}: choose another place")
    before = None if overwrite else _converted_before(source, out, time_embedding, double_norm)
    if before is not None and licence in (None, before.provenance.licence):
        return ConversionReport(out, before, (), written=False)
    refuse_occupied(out, overwrite)
    on_progress("reading")
    if adapts:
        flow, config = read_teacher(source)
        flow, provenance = drop_second_time(flow), config.provenance
    else:
        flow, config = load_official(source)
        provenance = replace(config.provenance, source=source_name(source))
    adaptation = _adaptation(time_embedding, double_norm, flow.network.arguments)
    adapted = with_positional_time(flow) if adaptation.get("positional_time") else flow
    adapted = with_double_norm(adapted) if adaptation.get("double_norm") else adapted
    provenance = replace(provenance, licence=licence or provenance.licence)
    with atomic_write(out) as folder:
        on_progress("writing")
        two_time = add_second_time(adapted, share=True)
        config = replace(config, provenance=provenance, results=(), **describe(two_time))
        write_checkpoint(folder, two_time, config)
        del two_time, adapted
        flow.network.fold(lay_out=False)
        on_progress("measuring how D depends on the noise")
        # Of the source: what is adapted is still to be trained.
        config = replace(config, noise_dependence=noise_dependence(flow))
        describe_checkpoint(folder, config)
        rows: tuple[ParityRow, ...] = ()
        if parity != "none":
            comparison = plan_comparison(flow, parity)
            expected = {dtype: denoised_images(flow, dtype, comparison, on_progress) for dtype in comparison.dtypes}
            del flow  # before the other network is loaded
            rows = compare(folder, expected, comparison, on_progress)
            if time_embedding is None:
                _require_parity(rows, source)
            with (folder / CARD).open("a", encoding="utf-8") as card:
                card.write(f"\nLargest relative difference to the source, by noise level:\n\n{table(rows)}\n")
    return ConversionReport(out, config, rows)


def _require_parity(rows: Sequence[ParityRow], source: Source) -> None:
    """Raises: CheckpointError: a difference is too large."""
    for dtype, tolerance in PARITY_TOLERANCE.items():
        name = str(dtype).removeprefix("torch.")
        errors = {row.sigma: getattr(row, name) for row in rows if getattr(row, name) is not None}
        for sigma, error in errors.items():
            if not error <= tolerance:
                raise CheckpointError(
                    f"{source.path} was not converted: at sigma {sigma:g} the converted network differs by "
                    f"{error:.1e} in {name}, more than {tolerance:g}; please report this"
                )


def _converted_before(
    source: Source, out: Path, time_embedding: str | None, double_norm: bool | None
) -> CheckpointConfig | None:
    """Returns the configuration of the checkpoint at `out` if it is what the conversion would write; else None."""
    if not (out / CONFIG).is_file() or not source.path.is_file():
        return None
    config = read_config(out)
    arguments = config.network.arguments
    if (
        config.stage != "teacher"
        or not _adaptation(time_embedding, double_norm, arguments).items() <= arguments.items()
    ):
        return None
    return load_checkpoint(out)[1] if config.provenance.sha256 == source.sha256 else None
