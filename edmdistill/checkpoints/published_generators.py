"""Reads few-step generators that the authors of other methods publish, to sample and measure them beside ours.

A file does not say by which method it was made, so the user names it; GENERATORS has the methods.

Facts: mingyuanzhou/SiD (generate_onestep.py), tianweiy/DMD2 (demo/imagenet_example.py, main/edm/edm_network.py),
openai/consistency_models (cm/karras_diffusion.py), locuslab/ect (training/networks.py, ct_eval.py), sony/ctm
and Kim-Dongjun/ctm-cifar10 (cm/karras_diffusion.py, cm/sample_util.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.class_names import class_names
from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance, SamplingDefaults, describe
from edmdistill.checkpoints.conversion_report import GeneratorReport
from edmdistill.checkpoints.ctm import to_ctm
from edmdistill.checkpoints.encoder import PIXELS, UNRECORDED
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official, edm_arguments
from edmdistill.checkpoints.openai import Adm, describe_misfit, read_arguments, read_weights
from edmdistill.checkpoints.source import Source, open_source, source_name
from edmdistill.checkpoints.store import build_flow, fill, save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import FlowNetwork

T = TypeVar("T")
Read = Callable[[Source], tuple[FlowNetwork, CheckpointConfig]]


class PublishedGenerator(NamedTuple):
    """How the generators of a method are read and sampled.

    Attributes:
        read: source -> its network and configuration.
        summary: what the file is.
        sigmas: the kind of network -> the published noise levels by the number of steps, where they are not EDM's curve
            from sigma_max.
        sigma_max: the noise level that it starts from.
        gamma: share of fresh noise between its steps.
    """

    read: Read
    summary: str
    sigmas: Callable[[str], Mapping[str, tuple[float, ...]]] = lambda kind: {}
    sigma_max: float = 80.0
    gamma: float = SamplingDefaults().gamma


def _read_pickle(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    flow, config = build_official(read_official(source.path, generator=True))
    if flow.img_channels == 4 and config.encoder == PIXELS:  # SiDA's pickles leave the encoder out, which is EDM2's
        config = replace(config, encoder=UNRECORDED.encoder(flow.sigma_data))
    return flow, config


def _read_consistency_model(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a consistency model of OpenAI: ADM, with the identity as boundary at sigma_min."""
    tensors = {name: tensor.tensor() for name, tensor in read_weights(source.path).items()}
    arguments, tensors = read_arguments(source.path, tensors)
    preconditioning = {"kind": "consistency", "sigma_min": 0.002, "c_noise_scale": 250.0}
    flow = _build(source.path, arguments, tensors, preconditioning)
    return flow, _config(source, flow, "mit")


def _read_ctm(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a generator of CTM: ADM for ImageNet 64x64, DDPM++ for CIFAR-10, each with a second time."""
    ctm = _parse_weights(source.path, to_ctm, "a CTM generator for ImageNet 64x64 or CIFAR-10, ema_*.pt")
    flow = _build(source.path, ctm.arguments, ctm.tensors, ctm.preconditioning, ctm.kind)
    return flow, _config(source, flow, ctm.licence, ctm.data_set)


def _read_dmd2(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a generator of DMD2: a state dict of EDM's ADM network, whose arguments follow from its shapes."""

    def to_dmd2(weights: Mapping[str, Tensor]) -> Adm:
        tensors = {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
        return edm_arguments(tensors, "adm"), tensors

    give = "the pytorch_model.bin of a DMD2 generator for ImageNet 64x64"
    flow = _build(source.path, *_parse_weights(source.path, to_dmd2, give))
    return flow, _config(source, flow, "cc-by-nc-sa-4.0")


def _parse_weights(path: Path, read: Callable[[Mapping[str, Tensor]], T], give: str) -> T:
    """Returns what `read` makes of a file's weights.

    Args:
        give: names the right file in the error.
    Raises: CheckpointError: the weights belong to another network.
    """
    weights = {name: tensor.tensor() for name, tensor in read_weights(path).items()}
    try:
        return read(weights)
    except Exception as error:  # the weights are untrusted: whatever breaks, they are the cause
        raise CheckpointError(f"{path} {describe_misfit(error).partition(': give')[0]}: give {give}") from error


def _build(
    path: Path,
    arguments: dict[str, Any],
    tensors: Mapping[str, Tensor],
    preconditioning: Mapping[str, Any] = {"kind": "edm"},
    kind: str = "adm",
) -> FlowNetwork:
    flow = build_flow(NetworkSpec(kind, arguments), preconditioning, str(path))
    fill(flow.network, dict(tensors), str(path))
    return flow


def _config(source: Source, flow: FlowNetwork, licence: str, data_set: str = "imagenet") -> CheckpointConfig:
    provenance = Provenance(source=source.path.name, sha256=source.sha256, licence=licence)
    names = class_names(flow.label_dim, source.path.name, data_set)
    return CheckpointConfig(stage="generator", label_names=names, provenance=provenance, **describe(flow))


def _ect_sigmas(kind: str) -> Mapping[str, tuple[float, ...]]:
    """Returns the noise levels of ECT's scripts: for ImageNet 64x64, whose network is EDM2's, or for CIFAR-10."""
    return {"1": (80.0,), "2": (80.0, 1.526 if kind == "edm2" else 0.821)}


GENERATORS: dict[str, PublishedGenerator] = {
    "sid": PublishedGenerator(_read_pickle, "SiD's and SiDA's one-step pickles, EDM and EDM2", sigma_max=2.5),
    "dmd2": PublishedGenerator(_read_dmd2, "DMD2's one-step ImageNet 64x64 weights, pytorch_model.bin"),
    "consistency-model": PublishedGenerator(
        _read_consistency_model, "OpenAI's consistency models, cd_*.pt and ct_*.pt"
    ),
    "ctm": PublishedGenerator(_read_ctm, "CTM's ImageNet 64x64 and CIFAR-10 weights, ema_*.pt", gamma=0.0),
    "ect": PublishedGenerator(_read_pickle, "ECT's pickles, EDM and EDM2", sigmas=_ect_sigmas),
}
"""By the name of --generator."""


def convert_generator(
    source: str | Path | Source, out: str | Path, method: str, *, overwrite: bool = False, licence: str | None = None
) -> GeneratorReport:
    """Writes a published generator as a checkpoint of ours, which every command that reads generators takes.

    Args:
        source: as of `convert`.
        out: the folder to write, whole or not at all.
        method: a key of GENERATORS.
        overwrite: replace an existing checkpoint.
        licence: of the weights, see check_licence; default: that of the network that they were distilled from.
    Raises: CheckpointError: the file holds something else, `out` is occupied, or the licence is no name of one.
    Differs: consistency models return to a noise level by sqrt(sigma^2 - sigma_min^2) noise, where gamma-sampling uses
        sigma; one step is the same. CTM's last jump ends at sigma_min, with a share sigma_min / t of the noise left;
        here, by the same evaluation of the network, it ends at 0.
    """
    licence = None if licence is None else check_licence(licence)
    entry, source = GENERATORS[method], open_source(source)
    if source.path.is_dir():
        raise CheckpointError(f"{source.path} is a folder: give the file, {entry.summary}")
    flow, config = entry.read(source)
    preconditioning = dataclasses.replace(flow.preconditioning, sigma_max=entry.sigma_max)
    flow = FlowNetwork(flow.network, preconditioning, label_dropout=flow.label_dropout)
    provenance = replace(config.provenance, source=source_name(source), licence=licence or config.provenance.licence)
    config = replace(
        config,
        stage="generator",
        method=method,
        provenance=provenance,
        sampling=SamplingDefaults(sigmas=dict(entry.sigmas(config.network.kind)), gamma=entry.gamma),
        noise_dependence=None,
        **describe(flow),
    )
    save_checkpoint(Path(out), flow, config, overwrite=overwrite)
    return GeneratorReport(Path(out), config)
