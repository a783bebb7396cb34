"""Reads few-step generators that the authors of other methods publish, to sample and measure them beside ours.

A file does not say by which method it was made, so the user names it; GENERATORS has the methods.

Facts: mingyuanzhou/SiD (generate_onestep.py), tianweiy/DMD2 (demo/imagenet_example.py, main/edm/edm_network.py),
openai/consistency_models (cm/karras_diffusion.py), locuslab/ect (training/networks.py, ct_eval.py), sony/ctm
(cm/unet.py, cm/karras_diffusion.py, cm/sample_util.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.class_names import class_names
from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance, SamplingDefaults, describe
from edmdistill.checkpoints.conversion_report import GeneratorReport
from edmdistill.checkpoints.encoder import PIXELS, STABLE_DIFFUSION
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.openai import PRECONDITIONING, TOP, Adm, read_arguments, read_weights, to_adm
from edmdistill.checkpoints.persistence import VAE_PARAMETERS
from edmdistill.checkpoints.source import Source, open_source, source_name
from edmdistill.checkpoints.store import build_flow, fill, save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import FlowNetwork

Read = Callable[[Source], tuple[FlowNetwork, CheckpointConfig]]


class PublishedGenerator(NamedTuple):
    """How the generators of a method are read and sampled.

    Attributes:
        read: source -> its network and configuration.
        summary: what the file is.
        sigmas: the published noise levels of its steps, where they are not EDM's curve from sigma_max.
        sigma_max: the noise level that it starts from.
        gamma: share of fresh noise between its steps.
    """

    read: Read
    summary: str
    sigmas: Mapping[str, tuple[float, ...]] = {}
    sigma_max: float = 80.0
    gamma: float = SamplingDefaults().gamma


def _read_pickle(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    flow, config = build_official(read_official(source.path, generator=True))
    if flow.img_channels == 4 and config.encoder == PIXELS:  # SiDA's pickles leave the encoder out, which is EDM2's
        scale = [VAE_PARAMETERS["final_std"] / std for std in STABLE_DIFFUSION["edm2"].std]
        bias = [-mean * factor for mean, factor in zip(STABLE_DIFFUSION["edm2"].mean, scale, strict=True)]
        encoder = {"kind": "StabilityVAEEncoder", "vae_name": VAE_PARAMETERS["vae_name"], "scale": scale, "bias": bias}
        config = replace(config, encoder=encoder)
    return flow, config


def _read_consistency_model(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Consistency models of OpenAI: ADM, with the identity as boundary at sigma_min."""
    tensors = {name: tensor.tensor() for name, tensor in read_weights(source.path).items()}
    arguments, tensors = read_arguments(source.path, tensors)
    preconditioning = {"kind": "consistency", "sigma_min": 0.002, "c_noise_scale": 250.0}
    flow = _filled(source.path, arguments, preconditioning, tensors)
    return flow, _config(source, flow, "mit")


def _read_ctm(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """CTM's ImageNet 64x64 weights: ADM, whose blocks have a linear map of their own for a second time."""
    weights = {name: tensor.tensor() for name, tensor in read_weights(source.path).items()}
    if not any(name.startswith("time_embed_s.") for name in weights):
        raise CheckpointError(f"{source.path} reads no second time: give a CTM generator for ImageNet 64x64, ema_*.pt")
    arguments, tensors = read_arguments(source.path, weights, two_time_adm)
    flow = _filled(source.path, arguments, PRECONDITIONING, tensors)
    return flow, _config(source, flow, "mit")


def two_time_adm(weights: Mapping[str, Tensor]) -> Adm:
    """Returns what `to_adm` does, of CTM's weights: each pair of maps of embeddings is one of both, side by side.

    Raises: as `to_adm`.
    """
    merged, second = dict(weights), {"second_time.gain": torch.ones([])}
    for name in [name for name in weights if "_s." in name]:
        first, tensor = name.replace("_s.", "."), merged.pop(name).float()
        layer, _, leaf = first.rpartition(".")
        if layer in TOP:
            second[f"second_time.{TOP[layer]}.{leaf}"] = tensor
        else:
            pair = merged[first].float(), tensor
            merged[first] = torch.cat(pair, dim=1) if leaf == "weight" else pair[0] + pair[1]
    arguments, tensors = to_adm(merged)
    return arguments | {"two_time": True, "split_times": True}, tensors | second


def _read_dmd2(source: Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """A state dict of EDM's ADM network, whose arguments follow from its shapes."""
    stored = read_weights(source.path)
    tensors = {name.removeprefix("model."): tensor.tensor().float() for name, tensor in stored.items()}
    arguments = adm_arguments(source.path, tensors)
    flow = _filled(source.path, arguments, {"kind": "edm"}, tensors)
    return flow, _config(source, flow, "cc-by-nc-sa-4.0")


def _filled(
    path: Path, arguments: dict[str, Any], preconditioning: dict[str, Any], tensors: Mapping[str, Tensor]
) -> FlowNetwork:
    flow = build_flow(NetworkSpec("adm", arguments), preconditioning, str(path))
    fill(flow.network, dict(tensors), str(path))
    return flow


def _config(source: Source, flow: FlowNetwork, licence: str) -> CheckpointConfig:
    provenance = Provenance(source=source.path.name, sha256=source.sha256, licence=licence)
    names = class_names(flow.label_dim, source.path.name, "imagenet" if flow.label_dim == 1000 else None)
    return CheckpointConfig(stage="generator", label_names=names, provenance=provenance, **describe(flow))


def adm_arguments(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns DhariwalUNet's constructor arguments by the names and shapes of its tensors.

    Raises: CheckpointError: they belong to another network.
    """
    pattern = re.compile(r"enc\.(\d+)x\1_block(\d+)\.(conv0|qkv)\.weight")
    blocks = [match for name in tensors if (match := pattern.fullmatch(name))]
    try:
        resolution = max(int(match[1]) for match in blocks)
        sizes = sorted({int(match[1]) for match in blocks}, reverse=True)
        first = tensors[f"enc.{resolution}x{resolution}_conv.weight"]
        channels = tensors["map_layer0.weight"].shape[1]
        widths = [tensors[f"enc.{size}x{size}_block0.conv0.weight"].shape[0] for size in sizes]
        augment, label = tensors.get("map_augment.weight"), tensors.get("map_label.weight")
        return {
            "img_resolution": resolution,
            "in_channels": first.shape[1],
            "out_channels": tensors["out_conv.weight"].shape[0],
            "label_dim": 0 if label is None else label.shape[1],
            "augment_dim": 0 if augment is None else augment.shape[1],
            "model_channels": channels,
            "channel_mult": [width // channels for width in widths],
            "channel_mult_emb": tensors["map_layer0.weight"].shape[0] // channels,
            "num_blocks": 1 + max(int(match[2]) for match in blocks),
            "attn_resolutions": sorted({int(match[1]) for match in blocks if match[3] == "qkv"}, reverse=True),
            "dropout": 0.0,
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} holds no ADM network by EDM's names ({error}): give the pytorch_model.bin of a DMD2 generator for "
            "ImageNet 64x64"
        ) from error


GENERATORS: dict[str, PublishedGenerator] = {
    "sid": PublishedGenerator(_read_pickle, "SiD's and SiDA's one-step pickles, EDM and EDM2", sigma_max=2.5),
    "dmd2": PublishedGenerator(_read_dmd2, "DMD2's one-step ImageNet 64x64 weights, pytorch_model.bin"),
    "consistency-model": PublishedGenerator(
        _read_consistency_model, "OpenAI's consistency models, cd_*.pt and ct_*.pt"
    ),
    "ctm": PublishedGenerator(_read_ctm, "CTM's ImageNet 64x64 weights, ema_*.pt", gamma=0.0),
    "ect": PublishedGenerator(_read_pickle, "ECT's pickles", sigmas={"1": (80.0,), "2": (80.0, 0.821)}),
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
        licence: of the weights; default: that of the network that they were distilled from.
    Raises: CheckpointError: the file holds something else, or `out` is occupied.
    Differs: consistency models return to a noise level by sqrt(sigma^2 - sigma_min^2) noise, where gamma-sampling uses
        sigma; one step is the same. CTM's last jump ends at sigma_min, with a share sigma_min / t of the noise left;
        here, by the same evaluation of the network, it ends at 0.
    """
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
        sampling=SamplingDefaults(sigmas=dict(entry.sigmas), gamma=entry.gamma),
        noise_dependence=None,
        **describe(flow),
    )
    save_checkpoint(Path(out), flow, config, overwrite=overwrite)
    return GeneratorReport(Path(out), config)
